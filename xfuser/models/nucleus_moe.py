"""Nucleus-Image: image tokens attend to image and text; a mixture of experts, which choose their tokens."""

from xfuser.models.plan import Attention, ModelPlan, Tokens

NUCLEUS_MOE = ModelPlan(
    blocks=("transformer_blocks",),
    attention={"attn": Attention(queries=("image",), keys=("image", "text"))},
    text="encoder_hidden_states",
    carried={"transformer_blocks": {"hidden_states": ("image",)}},
    per_token={
        "encoder_hidden_states": Tokens(("text",)),
        "attention_kwargs": Tokens(("image", "text")),  # holds the key mask
        "image_rotary_emb": (Tokens(("image",), dim=0), Tokens(("text",), dim=0)),
    },
    gathered={"transformer_blocks.*.img_mlp": ("hidden_states", "hidden_states_unmodulated")},
    row_lists=("img_shapes",),
    text_modules=("encoder_proj", "attn.add_k_proj", "attn.add_v_proj"),
    unpiped="experts select their tokens among all tokens of the image",
)
