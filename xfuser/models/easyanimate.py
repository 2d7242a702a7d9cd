"""EasyAnimate 5.1 (arXiv 2405.18991): joint attention, text tokens first; rotary tables over the video."""

from xfuser.models.plan import ModelPlan, Tokens

EASYANIMATE = ModelPlan(
    blocks=("transformer_blocks",),
    attention={"attn1": ("text", "image")},
    text="encoder_hidden_states",
    per_token={"image_rotary_emb": Tokens(("image",), dim=0)},
    returns=("image", "text"),
    unpaired_without={"transformer_blocks.*.attn1": "to_add_out"},  # else text has no output linear
    text_modules=("txt_ff", "attn1.add_q_proj", "attn1.add_k_proj", "attn1.add_v_proj", "attn1.to_add_out"),
)
