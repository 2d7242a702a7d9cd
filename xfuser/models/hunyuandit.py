"""HunyuanDiT 1.1 and 1.2 (arXiv 2405.08748): cross-attention to text, rotary tables, long skips."""

from dataclasses import replace

from xfuser.models.plan import ModelPlan, Tokens

HUNYUAN_DIT = ModelPlan(
    blocks=("blocks",),
    attention={"attn1": ("image",)},
    embed="pos_embed.proj",
    per_token={"image_rotary_emb": Tokens(("image",), dim=0)},
    residuals=("controlnet_block_samples",),
    unbatched=("image_rotary_emb",),
    text_modules=("attn2.to_k", "attn2.to_v"),
    skip="skip",
    undivided=("time_extra_emb.pooler",),
)

HUNYUAN_DIT_CONTROLNET = replace(HUNYUAN_DIT, embed=None, head=None, residuals=(), skip=None)
