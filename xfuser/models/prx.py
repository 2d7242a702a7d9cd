"""PRX: image tokens attend to image and text; the blocks do not change the text."""

from xfuser.models.plan import Attention, ModelPlan, Tokens

PRX = ModelPlan(
    blocks=("blocks",),
    attention={"attention": Attention(queries=("image",), keys=("text", "image"))},
    head="final_layer",
    text="encoder_hidden_states",
    carried={"blocks": {"hidden_states": ("image",)}},
    per_token={
        "encoder_hidden_states": Tokens(("text",)),
        "attention_mask": Tokens(("text",)),
        "image_rotary_emb": Tokens(("image",), dim=2),
    },
    text_modules=("attention.txt_kv_proj",),
)
