"""Cosmos Predict and Transfer (arXiv 2501.03575): cross-attention to text; time conditioning may differ between
frames."""

from xfuser.models.plan import ModelPlan, Tokens

COSMOS = ModelPlan(
    blocks=("transformer_blocks",),
    attention={"attn1": ("image",)},
    per_token={
        "embedded_timestep": Tokens(("image",), dims=3),
        "temb": Tokens(("image",), dims=3),
        "image_rotary_emb": Tokens(("image",), dim=0),
        "extra_pos_emb": Tokens(("image",)),
    },
    spread=("embedded_timestep",),
    residuals=("block_controlnet_hidden_states",),
)
