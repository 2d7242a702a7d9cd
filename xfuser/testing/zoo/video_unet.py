"""Video U-Nets, in which layers over space and layers over time alternate."""

from collections.abc import Callable
from typing import Any

import torch

from xfuser.testing.zoo.family import HEADS, TEXT, WORDS, Family, Inputs, text

FRAMES = 3
LEVELS = {
    "in_channels": 4, "out_channels": 4, "block_out_channels": (12, 24), "layers_per_block": 1, "norm_num_groups": 3,
    "cross_attention_dim": TEXT,
}  # fmt: skip
LATENTS = (4, FRAMES, 9, 7)


def blocks(down: str, up: str) -> dict[str, tuple[str, ...]]:
    """Return the block types of a level with attention to text and a level without."""
    return {"down_block_types": (f"CrossAttn{down}", down), "up_block_types": (up, f"CrossAttn{up}")}


def _motion(model: Any, rows: int, draw: Callable) -> Inputs:
    return {"encoder_hidden_states": draw(rows * FRAMES, WORDS, TEXT)}


def _from_picture(model: Any, rows: int, draw: Callable) -> Inputs:
    return {"encoder_hidden_states": draw(rows, 1, TEXT), "added_time_ids": torch.arange(3.0 * rows).view(rows, 3)}


def _i2vgen(model: Any, rows: int, draw: Callable) -> Inputs:
    pictures = {"image_latents": draw(rows, *LATENTS), "image_embeddings": draw(rows, TEXT)}
    return text(model, rows, draw) | pictures | {"fps": torch.arange(8, 8 + rows)}


OF_3D = LEVELS | blocks("DownBlock3D", "UpBlock3D") | {"attention_head_dim": 4}
FAMILIES = {
    "unet_motion": Family(
        "UNetMotionModel",
        "AnimateDiff, SparseCtrl, PIA",
        LEVELS
        | blocks("DownBlockMotion", "UpBlockMotion")
        | {"num_attention_heads": HEADS, "motion_num_attention_heads": HEADS},
        LATENTS,
        _motion,
        scaled=False,
    ),
    "unet_3d": Family(
        "UNet3DConditionModel",
        "ModelScope text-to-video, ZeroScope",
        OF_3D,
        LATENTS,
        text,
        scaled=False,
    ),
    "unet_i2vgen": Family(
        "I2VGenXLUNet",
        "I2VGen-XL",
        OF_3D,
        LATENTS,
        _i2vgen,
        scaled=False,
    ),
    "unet_svd": Family(
        "UNetSpatioTemporalConditionModel",
        "Stable Video Diffusion",
        {key: value for key, value in LEVELS.items() if key != "norm_num_groups"}
        | blocks("DownBlockSpatioTemporal", "UpBlockSpatioTemporal")
        | {
            "block_out_channels": (32, 64), "num_attention_heads": (2, 4), "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 12, "num_frames": FRAMES,
        },
        (FRAMES, 4, 9, 7),
        _from_picture,
        scaled=False,
    ),
}  # fmt: skip
