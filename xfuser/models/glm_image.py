"""GLM-Image: joint attention, text tokens first; rotary tables over the image."""

from xfuser.models.plan import ModelPlan, Tokens

GLM_IMAGE = ModelPlan(
    blocks=("transformer_blocks",),
    attention={"attn1": ("text", "image")},
    text="encoder_hidden_states",
    per_token={"image_rotary_emb": Tokens(("image",), dim=0), "attention_mask": Tokens(("text",))},
    returns=("image", "text"),
)
