"""Mochi 1: joint attention, image tokens first; each batch entry leaves its padded text tokens out."""

from xfuser.models.plan import ModelPlan, Tokens

MOCHI = ModelPlan(
    blocks=("transformer_blocks",),
    attention={"attn1": ("image", "text")},
    text="encoder_hidden_states",
    whole=True,
    per_token={"image_rotary_emb": Tokens(("image",), dim=0), "encoder_attention_mask": Tokens(("text",))},
    returns=("image", "text"),
    text_modules=("ff_context", "attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj", "attn1.to_add_out"),
    per_head={"image_rotary_emb": {3: 1}},
    least_steps=2,
)
