"""U-Nets of Stable Diffusion 1.x, 2.x (arXiv 2112.10752) and SDXL (arXiv 2307.01952): maps of several resolutions."""

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
    unpiped="a U-Net's blocks hand maps of several resolutions on to blocks far behind them, by skip connections",
)
