"""Qwen-Image and Qwen-Image-Edit (arXiv 2508.02324): joint attention, text tokens first, with a mask of the text;
Qwen-Image 2.1: one sequence with causal text."""

from dataclasses import replace

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

QWEN_IMAGE_CONTROLNET = replace(QWEN_IMAGE, embed=None, head=None, residuals=())

QWEN_IMAGE21 = ModelPlan(
    blocks=("transformer_blocks",),
    attention={"attn": ("image",)},
    head=None,
    per_token={"rotary_emb": Tokens(("image",), dim=0), "target_token_mask": Tokens(("image",), dim=0)},
    segments=("segments", "key_valid", "attention_mask"),
    by_number=("kv_cache",),
    row_lists=("img_shapes",),
    unpiped="reference images and text come before the image in one sequence, in the order of the prompt",
)
