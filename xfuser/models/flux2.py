"""Flux.2 and Flux.2 klein: joint attention, text tokens first; single-stream blocks carry both in one argument."""

from xfuser.models.plan import ModelPlan, Tokens

FLUX2 = ModelPlan(
    blocks=("transformer_blocks", "single_transformer_blocks"),
    attention={"attn": ("text", "image")},
    embed="x_embedder",
    head=None,
    text="encoder_hidden_states",
    carried={"single_transformer_blocks": {"hidden_states": ("text", "image")}},
    per_token={"image_rotary_emb": Tokens(("text", "image"), dim=0)},
    by_number=("kv_cache_mode",),
    returns=("text", "image"),
    text_modules=("ff_context", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
)
