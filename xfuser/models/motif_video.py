"""Motif-Video: joint attention with a key mask, video tokens first; also attention to the text alone."""

from xfuser.models.plan import Attention, ModelPlan, Tokens

MOTIF_VIDEO = ModelPlan(
    blocks=("transformer_blocks", "single_transformer_blocks"),
    attention={"attn": ("image", "text"), "cross_attn": Attention(queries=("image",), keys=("text",))},
    optional=("cross_attn",),
    text="encoder_hidden_states",
    needs_text=True,
    per_token={"attention_mask": Tokens(("image", "text"), dim=-1), "image_rotary_emb": Tokens(("image",), dim=0)},
    returns=("image", "text"),
    by_number=("image_embeds",),
)
