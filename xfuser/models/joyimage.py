"""JoyImage Edit and Edit Plus: joint attention, tokens of all images first."""

from dataclasses import replace

from xfuser.models.plan import ModelPlan, Tokens

JOYIMAGE_EDIT = ModelPlan(
    blocks=("double_blocks",),
    attention={"attn": ("image", "text")},
    text="encoder_hidden_states",
    per_token={"image_rotary_emb": (Tokens(("image",), dim=0), Tokens(("text",), dim=0))},
    returns=("image", "text"),
    text_modules=("txt_mlp", "attn.txt_attn_qkv", "attn.txt_attn_proj"),
    unpiped="reference images are further tokens of the video, beside the latents",
)

JOYIMAGE_EDIT_PLUS = replace(
    JOYIMAGE_EDIT,
    per_token={"image_rotary_emb": Tokens(("image",)), "attention_mask": Tokens(("image", "text"), dim=-1)},
    row_lists=("shape_list",),
)
