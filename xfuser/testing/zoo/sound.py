"""Sound."""

from collections.abc import Callable
from typing import Any

import torch

from xfuser.testing.zoo.family import (
    FRACTION,
    HEAD_DIM,
    HEADED,
    HEADS,
    TEXT,
    WIDTH,
    WORDS,
    Family,
    Inputs,
    key_mask,
    text,
)


def _stable_audio(model: Any, rows: int, draw: Callable) -> Inputs:
    angles = torch.arange(24)[:, None] * torch.tensor([0.5, 1.0] * 2)
    return text(model, rows, draw) | {
        "global_hidden_states": draw(rows, 1, 10), "rotary_embedding": (angles.cos(), angles.sin()),
    }  # fmt: skip


def _ace_step(model: Any, rows: int, draw: Callable) -> Inputs:
    more = {"context_latents": draw(rows, 45, 4), "timestep_r": torch.full((rows,), 0.2)}
    return text(model, rows, draw) | more


def _longcat(model: Any, rows: int, draw: Callable) -> Inputs:
    mask = {"encoder_attention_mask": key_mask(rows, WORDS).bool(), "attention_mask": key_mask(rows, 23).bool()}
    return text(model, rows, draw) | mask | {"latent_cond": draw(rows, 23, 4)}


def _music3(model: Any, rows: int, draw: Callable) -> Inputs:
    return {"encoder_hidden_states": draw(rows, 23, TEXT)}


def _stable_audio3(model: Any, rows: int, draw: Callable) -> Inputs:
    return text(model, rows, draw) | {
        "global_hidden_states": draw(rows, 10),
        "encoder_attention_mask": key_mask(rows, WORDS),
        "local_add_cond": draw(rows, 5, 23),
    }


FAMILIES: dict[str, Family] = {
    "ace_step": Family(
        "AceStepTransformer1DModel",
        "ACE-Step 1.5",
        {
            "hidden_size": WIDTH, "intermediate_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": HEAD_DIM, "in_channels": 8, "audio_acoustic_hidden_dim": 4,
            "sliding_window": 5, "encoder_hidden_size": TEXT,
        },
        (45, 4),
        _ace_step,
        timestep=FRACTION,
    ),
    "longcat_audio": Family(
        "LongCatAudioDiTTransformer",
        "LongCat-AudioDiT",
        {"dit_dim": WIDTH, "dit_depth": 3, "dit_heads": HEADS, "dit_text_dim": TEXT, "latent_dim": 4},
        (23, 4),
        _longcat,
        timestep=FRACTION,
    ),
    "minimax_music3": Family(
        "MiniMaxMusic3Transformer1DModel",
        "MiniMax Music 3",
        {
            **HEADED, "in_channels": 4, "condition_dim": TEXT, "num_layers": 3, "ff_inner_dim": 32, "rotary_dim": 4,
            "fourier_embedding_dim": 16,
        },
        (4, 23),
        _music3,
        timestep=FRACTION,
    ),
    "stable_audio": Family(
        "StableAudioDiTModel",
        "Stable Audio Open",
        {
            "num_attention_heads": 4, "attention_head_dim": HEAD_DIM, "in_channels": 4, "out_channels": 4,
            "num_layers": 3, "num_key_value_attention_heads": 2, "cross_attention_dim": 16, "time_proj_dim": 16,
            "global_states_input_dim": 10, "cross_attention_input_dim": TEXT,
        },
        (4, 23),
        _stable_audio,
    ),
    "stable_audio3": Family(
        "StableAudio3DiTModel",
        "Stable Audio 3",
        {
            "io_channels": 4, "embed_dim": WIDTH, "depth": 3, "num_heads": HEADS, "cond_token_dim": TEXT,
            "global_cond_dim": 10, "local_add_cond_dim": 5, "timestep_features_dim": 16, "num_memory_tokens": 5,
        },
        (4, 23),
        _stable_audio3,
        timestep=FRACTION,
    ),
}  # fmt: skip
