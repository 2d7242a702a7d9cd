"""Images: text and image are one sequence."""

from collections.abc import Callable
from typing import Any

import torch

from xfuser.testing.zoo.family import FRACTION, HEADED, HEADS, TEXT, WIDTH, WORDS, Family, Inputs, key_mask


def _z_image(model: Any, rows: int, draw: Callable) -> Inputs:
    words = draw(rows, WORDS, TEXT)
    return {"cap_feats": [words[row, : WORDS - row] for row in range(rows)]}


def _lumina2(model: Any, rows: int, draw: Callable) -> Inputs:
    return {"encoder_hidden_states": draw(rows, WORDS, TEXT), "encoder_attention_mask": key_mask(rows, WORDS)}


def _krea2(model: Any, rows: int, draw: Callable) -> Inputs:
    image = torch.cartesian_prod(torch.arange(1), torch.arange(5), torch.arange(3))
    return {
        "encoder_hidden_states": torch.stack([draw(rows, WORDS, TEXT) for _ in range(2)], dim=2),
        "position_ids": torch.cat([torch.zeros(WORDS, 3), image.float()]),
        "encoder_attention_mask": key_mask(rows, WORDS).bool(),
    }


def _omnigen(model: Any, rows: int, draw: Callable) -> Inputs:
    count = WORDS + 1 + 15
    mask = torch.ones(rows, count, count)
    mask[:, :WORDS, :WORDS] = torch.ones(WORDS, WORDS).tril()
    mask[:, :WORDS, WORDS:] = 0
    return {
        "input_ids": torch.arange(WORDS).expand(rows, -1),
        "input_img_latents": [],
        "input_image_sizes": {},
        "attention_mask": mask,
        "position_ids": torch.arange(count).expand(rows, -1),
    }


def _bria_fibo2(model: Any, rows: int, draw: Callable) -> Inputs:
    mask = torch.ones(rows, WORDS, dtype=torch.bool)
    mask[0, 3:] = False
    return {"encoder_hidden_states": draw(rows, 2, WORDS, TEXT), "encoder_attention_mask": mask}


def _ideogram4(model: Any, rows: int, draw: Callable) -> Inputs:
    """Return inputs of 22 tokens: text, then image; the first batch entry has less text than the others."""
    indicator = torch.tensor([3] * WORDS + [2] * 15).expand(rows, -1).clone()
    segments = torch.ones(rows, WORDS + 15, dtype=torch.long)
    segments[0, :2] = 0
    places = torch.cartesian_prod(torch.arange(1), torch.arange(5), torch.arange(3)) + WORDS
    words = torch.arange(WORDS)[:, None].expand(-1, 3)
    return {
        "encoder_hidden_states": draw(rows, WORDS + 15, TEXT),
        "position_ids": torch.cat([words, places])[None].expand(rows, -1, -1),
        "segment_ids": segments,
        "indicator": indicator,
    }


def _ernie(model: Any, rows: int, draw: Callable) -> Inputs:
    return {"text_bth": draw(rows, WORDS, TEXT), "text_lens": key_mask(rows, WORDS).sum(1)}


def _qwen21(model: Any, rows: int, draw: Callable) -> Inputs:
    mask = torch.ones(rows, WORDS, dtype=torch.bool)
    mask[0, :2] = False
    return {
        "encoder_hidden_states": draw(rows, WORDS, TEXT),
        "img_shapes": [[(1, 4, 6)]] * rows,
        "img_mask": (torch.arange(WORDS + 6) >= WORDS).expand(rows, -1),
        "encoder_hidden_states_mask": mask,
    }


FAMILIES: dict[str, Family] = {
    "krea2": Family(
        "Krea2Transformer2DModel",
        "Krea 2",
        {
            **HEADED, "in_channels": 8, "num_layers": 3, "num_key_value_heads": 1, "intermediate_size": 32,
            "timestep_embed_dim": 16, "text_hidden_dim": TEXT, "num_text_layers": 2, "text_num_attention_heads": 2,
            "text_num_key_value_heads": 2, "text_intermediate_size": 32, "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1, "axes_dims_rope": (4, 2, 2),
        },
        (15, 8),
        _krea2,
        timestep=FRACTION,
    ),
    "lumina2": Family(
        "Lumina2Transformer2DModel",
        "Lumina Image 2.0",
        {
            "sample_size": 8, "in_channels": 4, "hidden_size": WIDTH, "num_layers": 3, "num_refiner_layers": 1,
            "num_attention_heads": HEADS, "num_kv_heads": 1, "multiple_of": 8, "axes_dim_rope": (4, 2, 2),
            "axes_lens": (32, 32, 32), "cap_feat_dim": TEXT,
        },
        (4, 10, 6),
        _lumina2,
        timestep=FRACTION,
    ),
    "omnigen": Family(
        "OmniGenTransformer2DModel",
        "OmniGen",
        {
            "in_channels": 4, "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_key_value_heads": 1,
            "intermediate_size": 32, "num_layers": 3, "pad_token_id": 0, "vocab_size": 20,
            "max_position_embeddings": 64, "original_max_position_embeddings": 32,
            "rope_scaling": {"short_factor": [1.0] * 4, "long_factor": [1.0] * 4}, "pos_embed_max_size": 16,
            "time_step_dim": 16,
        },
        (4, 10, 6),
        _omnigen,
        timestep=FRACTION,
    ),
    "z_image": Family(
        "ZImageTransformer2DModel",
        "Z-Image",
        {
            "in_channels": 4, "dim": WIDTH, "n_layers": 3, "n_refiner_layers": 1, "n_heads": HEADS, "n_kv_heads": HEADS,
            "cap_feat_dim": TEXT, "axes_dims": [4, 2, 2], "axes_lens": [64, 32, 32],
        },
        (4, 1, 10, 6),
        _z_image,
        "t",
        FRACTION,
    ),
    "bria_fibo2": Family(
        "BriaFibo2Transformer2DModel",
        "Bria FIBO 2",
        {
            "in_channels": 4, "dim": WIDTH, "n_layers": 3, "n_refiner_layers": 1, "n_heads": HEADS,
            "cap_feat_dim": TEXT, "injection_layer_ids": (1,), "perceiver_num_layers": 1, "min_num_gist_tokens": 3,
            "max_num_gist_tokens": 7, "gist_step": 1, "gist_min_text_len": 3, "gist_max_text_len": 7,
            "axes_dims": (4, 2, 2), "axes_lens": (32, 16, 16),
        },
        (4, 10, 6),
        _bria_fibo2,
        timestep=FRACTION,
    ),
    "ideogram4": Family(
        "Ideogram4Transformer2DModel",
        "Ideogram 4",
        {
            **HEADED, "in_channels": 8, "num_layers": 3, "intermediate_size": 32, "adaln_dim": 16,
            "llm_features_dim": TEXT, "mrope_section": (2, 1, 1),
        },
        (WORDS + 15, 8),
        _ideogram4,
        timestep=FRACTION,
    ),
    "ernie_image": Family(
        "ErnieImageTransformer2DModel",
        "ERNIE-Image",
        {
            "hidden_size": WIDTH, "num_attention_heads": HEADS, "num_layers": 3, "ffn_hidden_size": 32,
            "in_channels": 4, "out_channels": 4, "text_in_dim": TEXT, "rope_axes_dim": (4, 2, 2),
        },
        (4, 5, 3),
        _ernie,
    ),
    "qwen_image21": Family(
        "QwenImage21Transformer2DModel",
        "Qwen-Image 2.1",
        {
            **HEADED, "in_channels": 8, "out_channels": 8, "num_layers": 3, "context_in_dim": TEXT,
            "axes_dims_rope": (4, 2, 2),
        },
        (24, 8),
        _qwen21,
        timestep=FRACTION,
    ),
}  # fmt: skip
