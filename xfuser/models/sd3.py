"""Stable Diffusion 3 and 3.5 (arXiv 2403.03206): joint attention, image tokens first; 3.5 has image-only attn2."""

from dataclasses import replace

from xfuser.models.plan import ModelPlan

SD3 = ModelPlan(
    blocks=("transformer_blocks",),
    attention={"attn": ("image", "text"), "attn2": ("image",)},
    optional=("attn2",),
    embed="pos_embed.proj",
    text="encoder_hidden_states",
    residuals=("block_controlnet_hidden_states",),
    returns=("text", "image"),
    text_modules=("ff_context", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj", "attn.to_add_out"),
    counts_steps=("skip_layers",),
    prompted=("image", "picture"),
)

SD3_CONTROLNET = replace(SD3, embed=None, head=None, residuals=())
