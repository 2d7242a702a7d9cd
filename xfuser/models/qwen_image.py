"""Qwen-Image and Qwen-Image-Edit (arXiv 2508.02324): joint attention with a mask of the text, which comes first."""

from xfuser.models.plan import ModelPlan, Tokens

QWEN_IMAGE = ModelPlan(
    blocks=("transformer_blocks",),
    attention={"attn": ("text", "image")},
    embed="img_in",
    text="encoder_hidden_states",
    needs_text=True,
    per_token={
        "encoder_hidden_states_mask": Tokens(("text",)),
        "image_rotary_emb": (Tokens(("image",), dim=0), Tokens(("text",), dim=0)),
        "modulate_index": Tokens(("image",)),
    },
    residuals=("controlnet_block_samples",),
    row_lists=("img_shapes", "txt_seq_lens"),
    returns=("text", "image"),
    text_modules=("txt_mlp", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
