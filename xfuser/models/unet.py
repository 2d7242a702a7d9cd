"""U-Nets, whose maps have several resolutions: for images, Stable Diffusion 1.x, 2.x (arXiv 2112.10752) and SDXL (arXiv
2307.01952); for videos, ModelScope (arXiv 2308.06571), I2VGen-XL (arXiv 2311.04145), AnimateDiff (arXiv 2307.04725) and
Stable Video Diffusion (arXiv 2311.15127)."""

from dataclasses import replace

from xfuser.models.plan import ModelPlan

UNET = ModelPlan(
    blocks=(),
    attention={},
    embed="conv_in",
    head="conv_out",
    latents="sample",
    halvings="num_upsamplers",
    residuals=(
        "down_block_additional_residuals",
        "mid_block_additional_residual",
        "down_intrablock_additional_residuals",
    ),
    unsequenced="a U-Net works on maps of several resolutions, not on one sequence of tokens",
    unpiped="a U-Net's skip connections pass maps of several resolutions to much later blocks",
)

VIDEO_UNET = replace(
    UNET,
    halvings=None,
    residuals=(),
    unsequenced=(
        "a U-Net's maps of several resolutions are not a sequence of tokens, and its layers over time, which work pixel"
        " by pixel, do not support bands of rows"
    ),
)

MOTION_UNET = replace(
    VIDEO_UNET, by_frame=("encoder_hidden_states", "down_block_additional_residuals", "mid_block_additional_residual")
)
