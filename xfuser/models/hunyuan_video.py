"""HunyuanVideo (arXiv 2412.03603), HunyuanVideo 1.5 (arXiv 2511.18870) and HunyuanImage 2.1: joint attention with a key
mask, image tokens first."""

from dataclasses import replace

from xfuser.models.plan import ModelPlan, Tokens

HUNYUAN_VIDEO = ModelPlan(
    blocks=("transformer_blocks", "single_transformer_blocks"),
    attention={"attn": ("image", "text")},
    text="encoder_hidden_states",
    needs_text=True,
    text_modules=("ff_context", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    per_token={
        "attention_mask": Tokens(("image", "text"), dim=-1),
        "freqs_cis": Tokens(("image",), dim=0),
        "image_rotary_emb": Tokens(("image",), dim=0),
    },
    leading={"num_tokens": "image"},
    returns=("image", "text"),
)

HUNYUAN_VIDEO_15 = replace(
    HUNYUAN_VIDEO,
    blocks=("transformer_blocks",),
    per_token={"attention_mask": Tokens(("text",)), "freqs_cis": Tokens(("image",), dim=0)},
    leading={},
    counts_steps=("timestep_r",),
)

HUNYUAN_IMAGE = replace(
    HUNYUAN_VIDEO,
    per_token={"attention_mask": Tokens(("image", "text"), dim=-1), "image_rotary_emb": Tokens(("image",), dim=0)},
    leading={},
    counts_steps=("timestep_r",),
)

FRAMEPACK = replace(
    HUNYUAN_VIDEO,
    head=None,
    leading={},
    unbatched=(
        "indices_latents", "indices_latents_clean", "indices_latents_history_2x", "indices_latents_history_4x",
    ),
    unpiped="past frames, in several sizes, come before the latents' tokens as further tokens of the video",
)  # fmt: skip
