"""OmniGen (arXiv 2409.11340): one sequence of text, pictures and the image, with a mask over pairs of tokens, which is
cut where attention needs it."""

from xfuser.models.plan import ModelPlan, Tokens

OMNIGEN = ModelPlan(
    blocks=("layers",),
    attention={"self_attn": ("image",)},
    head=None,
    per_token={"image_rotary_emb": Tokens(("image",), dim=-2)},
    unpiped="text and image are one sequence, of which the blocks do not know where the image begins",
)
