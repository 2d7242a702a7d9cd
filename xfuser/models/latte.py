"""Latte (arXiv 2401.03048): blocks over the tokens of a frame alternate with blocks over the frames of a token.

The tokens of each frame are split, so that the second kind of blocks needs nothing from other ranks.
"""

from xfuser.models.plan import ModelPlan, Tokens

LATTE = ModelPlan(
    blocks=("transformer_blocks", "temporal_transformer_blocks"),
    attention={"attn1": ("image",)},
    carried={"temporal_transformer_blocks": {}},
    per_token={"timestep": Tokens(("image",), dim=0, within="temporal_transformer_blocks", rows=True)},
    unpiped="spatial and temporal blocks alternate, and tokens are rearranged in between",
)
