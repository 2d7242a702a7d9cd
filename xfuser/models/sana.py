"""Sana and Sana-Sprint (arXiv 2410.10629, 2503.09641): linear attention, and convolutions over the grid of tokens."""

from xfuser.models.plan import ModelPlan

SANA = ModelPlan(
    blocks=("transformer_blocks",),
    attention={},
    linear=("attn1",),
    rows="height",
    convolutions=("ff",),
    residuals=("controlnet_block_samples",),
    unpiped="linear attention keeps a sum over all tokens, of which the part of one patch cannot be renewed",
)
