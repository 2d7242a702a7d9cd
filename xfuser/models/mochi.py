"""Mochi 1: joint attention that leaves padded text tokens out, row by row; image tokens first."""

from xfuser.models.plan import ModelPlan, Tokens

MOCHI = ModelPlan(
    blocks=("transformer_blocks",),
    attention={"attn1": ("image", "text")},
    whole=True,
    per_token={"image_rotary_emb": Tokens(("image",), dim=0)},
    returns=("image", "text"),
    per_head={"image_rotary_emb": {3: 1}},
    unpiped="attention takes as many text tokens as each row of the batch has, so that they cannot be kept apart",
)
