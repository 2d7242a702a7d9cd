"""Images: text by cross-attention, or none."""

from collections.abc import Callable
from typing import Any

import torch

from xfuser.testing.zoo.family import HEAD_DIM, HEADED, HEADS, TEXT, WIDTH, WORDS, Family, Inputs, key_mask, text


def _unet(model: Any, rows: int, draw: Callable) -> Inputs:
    added = {"text_embeds": draw(rows, 8), "time_ids": 10 * draw(rows, 6)}
    return {"encoder_hidden_states": draw(rows, WORDS, TEXT), "added_cond_kwargs": added}


def _pixart(model: Any, rows: int, draw: Callable) -> Inputs:
    conditions = {"resolution": None, "aspect_ratio": None}
    inputs = {"encoder_hidden_states": draw(rows, WORDS, TEXT), "encoder_attention_mask": key_mask(rows, WORDS)}
    return inputs | {"added_cond_kwargs": conditions}


def _dit(model: Any, rows: int, draw: Callable) -> Inputs:
    return {"class_labels": torch.arange(rows)}


def _hunyuan_dit(model: Any, rows: int, draw: Callable) -> Inputs:
    angles = torch.arange(15, dtype=torch.float32)[:, None] * torch.linspace(0.1, 1, HEAD_DIM)
    return {
        "encoder_hidden_states": draw(rows, 7, 8),
        "text_embedding_mask": key_mask(rows, WORDS),
        "encoder_hidden_states_t5": draw(rows, 5, TEXT),
        "text_embedding_mask_t5": key_mask(rows, 5),
        "image_meta_size": None,
        "style": None,
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


def _lumina_next(model: Any, rows: int, draw: Callable) -> Inputs:
    angles = torch.arange(6)[:, None, None] * torch.linspace(0.1, 1, 4) + torch.arange(6)[:, None] * 0.3
    return text(model, rows, draw) | {
        "encoder_mask": key_mask(rows, WORDS),
        "image_rotary_emb": torch.polar(torch.ones_like(angles), angles),
        "cross_attention_kwargs": {"base_sequence_length": 6},
    }


FAMILIES: dict[str, Family] = {
    "dit": Family(
        "DiTTransformer2DModel",
        "DiT-XL",
        {
            **HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 3, "sample_size": 10, "patch_size": 2,
            "num_embeds_ada_norm": 1000,
        },
        (4, 10, 10),
        _dit,
    ),
    "hunyuan_dit": Family(
        "HunyuanDiT2DModel",
        "HunyuanDiT 1.1, 1.2",
        {
            **HEADED, "in_channels": 4, "patch_size": 2, "sample_size": 8, "hidden_size": WIDTH, "num_layers": 4,
            "mlp_ratio": 2.0, "cross_attention_dim": 8, "cross_attention_dim_t5": TEXT, "pooled_projection_dim": 8,
            "text_len": 7, "text_len_t5": 5, "use_style_cond_and_image_meta_size": False,
        },
        (4, 10, 6),
        _hunyuan_dit,
    ),
    "pixart": Family(
        "PixArtTransformer2DModel",
        "PixArt-alpha, PixArt-Sigma",
        {
            **HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 3, "cross_attention_dim": WIDTH,
            "sample_size": 8, "patch_size": 2, "caption_channels": TEXT, "use_additional_conditions": False,
        },
        (4, 10, 6),
        _pixart,
    ),
    "sana": Family(
        "SanaTransformer2DModel",
        "Sana, Sana-Sprint",
        {
            **HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 3, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12, "cross_attention_dim": WIDTH, "caption_channels": TEXT, "mlp_ratio": 2.0,
            "sample_size": 8,
        },
        (4, 5, 3),
        text,
    ),
    "unet": Family(
        "UNet2DConditionModel",
        "Stable Diffusion 1.x, 2.x, XL",
        {
            "in_channels": 4, "out_channels": 4, "block_out_channels": (12, 24, 24), "layers_per_block": 1,
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "norm_num_groups": 3,
            "attention_head_dim": HEADS, "cross_attention_dim": TEXT, "use_linear_projection": True,
            "addition_embed_type": "text_time", "addition_time_embed_dim": 4,
            "projection_class_embeddings_input_dim": 8 + 6 * 4,
        },
        (4, 17, 13),
        _unet,
        scaled=False,
    ),
    "lumina_next": Family(
        "LuminaNextDiT2DModel",
        "Lumina-Next",
        {
            "sample_size": 8, "in_channels": 4, "hidden_size": WIDTH, "num_layers": 3, "num_attention_heads": HEADS,
            "num_kv_heads": 1, "multiple_of": 8, "cross_attention_dim": TEXT, "learn_sigma": False,
        },
        (4, 10, 6),
        _lumina_next,
    ),
}  # fmt: skip
