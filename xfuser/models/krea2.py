"""Krea 2: one sequence, text tokens first, with a key mask."""

from xfuser.models.plan import ModelPlan, Tokens

KREA2 = ModelPlan(
    blocks=("transformer_blocks",),
    attention={"attn": ("image",)},
    head=None,
    per_token={"attention_mask": Tokens(("image",), dim=-1), "image_rotary_emb": Tokens(("image",), dim=0)},
    unbatched=("position_ids",),
    unpiped="text and image are one sequence, of which the blocks do not know where the image begins",
)
