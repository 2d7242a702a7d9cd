"""Allegro (arXiv 2410.15458): cross-attention to text, a key mask, rotary tables."""

from xfuser.models.plan import ModelPlan, Tokens

ALLEGRO = ModelPlan(
    blocks=("transformer_blocks",),
    attention={"attn1": ("image",)},
    per_token={
        "attention_mask": Tokens(("image",), dim=-1),
        "image_rotary_emb": (None, Tokens(("image",))),  # tables, and each token's position in them
    },
    unbatched=("image_rotary_emb",),
    text_modules=("attn2.to_k", "attn2.to_v"),
)
