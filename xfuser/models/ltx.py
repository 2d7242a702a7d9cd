"""LTX-Video (arXiv 2501.00103), LTX-2 (arXiv 2601.03233), the refiner of SANA-WM: cross-attention to text; time
conditioning may differ between tokens."""

from dataclasses import replace

from xfuser.models.plan import Attention, ModelPlan, Tokens

LTX_VIDEO = ModelPlan(
    blocks=("transformer_blocks",),
    attention={"attn1": ("image",)},
    embed="proj_in",
    per_token={"image_rotary_emb": Tokens(("image",)), "temb": Tokens(("image",))},
    spread=("temb",),
    text_modules=("attn2.to_k", "attn2.to_v"),
    per_head={"image_rotary_emb": {3: -1}},
)

# The second stream, ``"text"`` in the plan, is sound.
_VIDEO, _SOUND = Tokens(("image",)), Tokens(("text",))
LTX2_VIDEO = ModelPlan(
    blocks=("transformer_blocks",),
    attention={
        "attn1": ("image",),
        "audio_attn1": ("text",),
        "audio_to_video_attn": Attention(queries=("image",), keys=("text",)),
        "video_to_audio_attn": Attention(queries=("text",), keys=("image",)),
    },
    idle=("all_perturbed",),
    embed="proj_in",
    head=None,
    text="audio_hidden_states",
    sound="audio_hidden_states",
    needs_text=True,
    per_token={
        "self_attention_mask": Tokens(("image",), dim=-1),
        "temb": _VIDEO,
        "temb_ca_scale_shift": _VIDEO,
        "temb_ca_gate": _VIDEO,
        "temb_audio": _SOUND,
        "temb_ca_audio_scale_shift": _SOUND,
        "temb_ca_audio_gate": _SOUND,
        "video_rotary_emb": Tokens(("image",), dim=-2),
        "audio_rotary_emb": Tokens(("text",), dim=-2),
        "ca_video_rotary_emb": Tokens(("image",), dim=-2),
        "ca_audio_rotary_emb": Tokens(("text",), dim=-2),
    },
    returns=("image", "text"),
    text_modules=(
        "audio_attn1",
        "audio_attn2.to_q",
        "audio_attn2.to_out",
        "audio_ff",
        "audio_to_video_attn.to_k",
        "audio_to_video_attn.to_v",
        "video_to_audio_attn.to_q",
        "video_to_audio_attn.to_out",
    ),
    per_head={"query_rotary_emb": {3: -1, 4: 1}, "key_rotary_emb": {3: -1, 4: 1}},
)

SANA_WM_REFINER = replace(
    LTX_VIDEO,
    per_token={"video_rotary_emb": Tokens(("image",), dim=-2), "temb": Tokens(("image",))},
    by_number=("kv_cache",),
    per_head={"query_rotary_emb": {3: -1, 4: 1}},
)
