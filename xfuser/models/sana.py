"""Sana, Sana-Sprint, Sana-Video, SANA-WM (arXiv 2410.10629, 2503.09641, 2509.24695): linear attention, and convolutions
over the grid of tokens."""

from dataclasses import replace

from xfuser.models.plan import ModelPlan, Tokens

SANA = ModelPlan(
    blocks=("transformer_blocks",),
    attention={},
    linear=("attn1",),
    rows="height",
    convolutions=("ff",),
    residuals=("controlnet_block_samples",),
)

# Rows are frames: only ``ff.conv_temp`` convolves over them, other convolutions stay within a frame.
SANA_VIDEO = replace(
    SANA,
    rows="frames",
    convolutions=("ff.conv_temp",),
    per_token={"rotary_emb": Tokens(("image",)), "timestep": Tokens(("image",), dims=3)},
    spread=("timestep",),
)

SANA_WM = ModelPlan(
    blocks=("blocks",),
    attention={},
    head=None,
    image="x",
    unsequenced="its attention is a recurrence from frame to frame, and averages each frame's tokens",
    unpiped="its attention is a recurrence from frame to frame, which a patch cannot update",
)
