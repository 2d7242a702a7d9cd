"""Motif-Video: joint attention with a key mask, video tokens first; further attention from video to text only."""

from xfuser.models.plan import Attention, ModelPlan, Tokens

MOTIF_VIDEO = ModelPlan(
    blocks=("transformer_blocks", "single_transformer_blocks"),
    attention={"attn": ("image", "text"), "cross_attn": Attention(queries=("image",), keys=("text",))},
    optional=("cross_attn",),
    text="encoder_hidden_states",
    needs_text=True,
    text_modules=(
        "ff_context",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "cross_attn.to_k",
        "cross_attn.to_v",
    ),
    per_token={"attention_mask": Tokens(("image", "text"), dim=-1), "image_rotary_emb": Tokens(("image",), dim=0)},
    returns=("image", "text"),
    by_number=("image_embeds",),
)
