"""Chroma: joint attention, text tokens first, with a mask over pairs of tokens, which is cut in the attention;
single-stream blocks carry both streams in one argument."""

from xfuser.models.plan import ModelPlan, Tokens

CHROMA = ModelPlan(
    blocks=("transformer_blocks", "single_transformer_blocks"),
    attention={"attn": ("text", "image")},
    embed="x_embedder",
    text="encoder_hidden_states",
    carried={"single_transformer_blocks": {"hidden_states": ("text", "image")}},
    per_token={"image_rotary_emb": Tokens(("text", "image"), dim=0)},
    residuals=("controlnet_block_samples", "controlnet_single_block_samples"),
    unbatched=("img_ids", "txt_ids"),
    prompted=("picture",),
    returns=("text", "image"),
    text_modules=("ff_context", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
