"""CogView3-Plus (arXiv 2403.05121) and CogView4: joint attention, text tokens first."""

from dataclasses import replace

from xfuser.models.plan import ModelPlan, Tokens

COGVIEW3_PLUS = ModelPlan(
    blocks=("transformer_blocks",),
    attention={"attn1": ("text", "image")},
    text="encoder_hidden_states",
    returns=("image", "text"),
)

COGVIEW4 = replace(
    COGVIEW3_PLUS, per_token={"image_rotary_emb": Tokens(("image",), dim=0)}, unbatched=("image_rotary_emb",)
)
