"""PixArt-alpha (arXiv 2310.00426) and PixArt-Sigma (arXiv 2403.04692): cross-attention to text."""

from xfuser.models.plan import ModelPlan, Tokens

PIXART = ModelPlan(
    blocks=("transformer_blocks",),
    attention={"attn1": ("image",)},
    embed="pos_embed.proj",
    per_token={"attention_mask": Tokens(("image",), dim=-1)},
    text_modules=("attn2.to_k", "attn2.to_v"),
    least_steps=2,
)
