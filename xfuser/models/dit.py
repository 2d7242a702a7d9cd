"""DiT-XL (arXiv 2212.09748): class-conditional, no text."""

from xfuser.models.plan import ModelPlan

DIT = ModelPlan(
    blocks=("transformer_blocks",),
    attention={"attn1": ("image",)},
    embed="pos_embed.proj",
    head="proj_out_2",
    lent=("transformer_blocks.0.norm1.emb",),
)
