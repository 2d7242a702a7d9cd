"""Flux.1, Bria 3.2, LongCat-Image (arXiv 2512.07584), Ovis-Image (arXiv 2511.22982): joint attention, text tokens
first, in double- and single-stream blocks; rotary tables over both."""

from dataclasses import replace

from xfuser.models.plan import ModelPlan, Tokens

FLUX = ModelPlan(
    blocks=("transformer_blocks", "single_transformer_blocks"),
    attention={"attn": ("text", "image")},
    embed="x_embedder",
    text="encoder_hidden_states",
    per_token={"image_rotary_emb": Tokens(("text", "image"), dim=0)},
    residuals=("controlnet_block_samples", "controlnet_single_block_samples"),
    unbatched=("img_ids", "txt_ids"),
    prompted=("picture",),
    returns=("text", "image"),
    text_modules=("ff_context", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)

WITHOUT_CONTROL = replace(FLUX, residuals=(), prompted=())
FLUX_CONTROLNET = replace(FLUX, embed=None, head=None, residuals=(), prompted=())
