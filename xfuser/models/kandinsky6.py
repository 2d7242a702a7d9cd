"""Kandinsky 6: video and sound attend to each other; cross-attention to text, rotary matrices. Its upscaler."""

from xfuser.models.plan import Attention, ModelPlan, Tokens

# The second stream, ``"text"`` in the plan, is sound, if a call has any.
KANDINSKY6 = ModelPlan(
    blocks=("visual_transformer_blocks",),
    attention={
        "video_dec_block.self_attention": ("image",),
        "audio_dec_block.self_attention": ("text",),
        "va_cross_attention": Attention(queries=("image",), keys=("text",)),
        "av_cross_attention": Attention(queries=("text",), keys=("image",)),
    },
    head=None,
    image="vis",
    text="aud",
    per_token={"vis_rope": Tokens(("image",), dim=0), "aud_rope": Tokens(("text",), dim=0)},
    unbatched=("visual_rope_pos",),
    returns=("image", "text"),
    frames=1,
    unpiped="its blocks return None for sound if a call has no sound",
)

KANDINSKY6_SR = ModelPlan(
    blocks=("visual_transformer_blocks",),
    attention={},
    head=None,
    frames=1,
    unsequenced="each block of 64 queries selects its keys by averages of all blocks, with flex attention",
    unpiped="each block of 64 queries selects its keys by averages of all blocks, with flex attention",
)
