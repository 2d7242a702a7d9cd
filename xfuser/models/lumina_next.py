"""Lumina-Next (arXiv 2406.18583): cross-attention to text; rotary tables; the scale of attention grows with the number
of tokens."""

from xfuser.models.plan import ModelPlan, Tokens

LUMINA_NEXT = ModelPlan(
    blocks=("layers",),
    attention={"attn1": ("image",)},
    head="norm_out",
    per_token={"attention_mask": Tokens(("image",)), "image_rotary_emb": Tokens(("image",))},
    length_base=("cross_attention_kwargs", "base_sequence_length"),
    unbatched=("image_rotary_emb",),
    unpaired=("layers.*.attn1", "layers.*.attn2"),
    text_modules=("norm1_context", "attn2.to_k", "attn2.to_v"),
)
