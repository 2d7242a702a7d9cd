"""Kandinsky 5 (arXiv 2511.14993): cross-attention to text, rotary matrices."""

from xfuser.models.plan import ModelPlan, Tokens

KANDINSKY5 = ModelPlan(
    blocks=("visual_transformer_blocks",),
    attention={"self_attention": ("image",)},
    head=None,
    image="visual_embed",
    per_token={"rope": Tokens(("image",))},
    unbatched=("text_rope_pos", "visual_rope_pos"),
    text_modules=("cross_attention.to_key", "cross_attention.to_value"),
    frames=1,
    height=2,
)
