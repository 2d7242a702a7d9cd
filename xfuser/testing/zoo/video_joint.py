"""Videos: text, or sound, and video attend to each other as two streams."""

from collections.abc import Callable
from typing import Any

import torch

from xfuser.testing.zoo.family import HEAD_DIM, HEADED, HEADS, TEXT, VIDEO, WIDTH, WORDS, Family, Inputs, key_mask


def _cogvideox(model: Any, rows: int, draw: Callable) -> Inputs:
    angles = torch.arange(45, dtype=torch.float32)[:, None] * torch.linspace(0.1, 1, HEAD_DIM)
    return {"encoder_hidden_states": draw(rows, WORDS, TEXT), "image_rotary_emb": (angles.cos(), angles.sin())}


def _consisid(model: Any, rows: int, draw: Callable) -> Inputs:
    faces = {"id_cond": draw(rows, 12), "id_vit_hidden": [draw(rows, 5, 10) for _ in range(2)]}
    return _cogvideox(model, rows, draw) | faces


def _hunyuan_video(model: Any, rows: int, draw: Callable) -> Inputs:
    return {
        "encoder_hidden_states": draw(rows, WORDS, TEXT),
        "encoder_attention_mask": key_mask(rows, WORDS),
        "pooled_projections": draw(rows, 10),
        "guidance": torch.full((rows,), 3000.0),
    }


def _hunyuan_video_15(model: Any, rows: int, draw: Callable) -> Inputs:
    return {
        "encoder_hidden_states": draw(rows, WORDS, TEXT),
        "encoder_attention_mask": key_mask(rows, WORDS),
        "encoder_hidden_states_2": draw(rows, 4, 12),
        "encoder_attention_mask_2": key_mask(rows, 4),
        "image_embeds": draw(rows, 3, 10),
    }


def _ltx2(model: Any, rows: int, draw: Callable) -> Inputs:
    return {
        "audio_hidden_states": draw(rows, 5, 8),
        "encoder_hidden_states": draw(rows, WORDS, TEXT),
        "audio_encoder_hidden_states": draw(rows, WORDS, TEXT),
        "encoder_attention_mask": key_mask(rows, WORDS),
        "audio_encoder_attention_mask": key_mask(rows, WORDS),
        "num_frames": 3, "height": 5, "width": 3, "fps": 24.0, "audio_num_frames": 5,
    }  # fmt: skip


def _mochi(model: Any, rows: int, draw: Callable) -> Inputs:
    return {"encoder_hidden_states": draw(rows, WORDS, TEXT), "encoder_attention_mask": key_mask(rows, WORDS).bool()}


def _framepack(model: Any, rows: int, draw: Callable) -> Inputs:
    counts = {"latents_clean": 2, "latents_history_2x": 2, "latents_history_4x": 4}
    history = {name: draw(rows, 4, frames, 8, 8) for name, frames in counts.items()}
    places = {name.replace("latents", "indices_latents"): torch.arange(frames) for name, frames in counts.items()}
    return _hunyuan_video(model, rows, draw) | history | places | {
        "image_embeds": draw(rows, 3, 10), "indices_latents": torch.arange(3) + 8,
    }  # fmt: skip


def _motif(model: Any, rows: int, draw: Callable) -> Inputs:
    return {"encoder_hidden_states": draw(rows, WORDS, TEXT), "encoder_attention_mask": key_mask(rows, WORDS)}


def _easyanimate(model: Any, rows: int, draw: Callable) -> Inputs:
    return {"encoder_hidden_states": draw(rows, WORDS, TEXT)}


def _minimax_h3(model: Any, rows: int, draw: Callable) -> Inputs:
    """Return inputs for a sequence of text, then sound, then video."""
    counts = torch.tensor([WORDS, 5, 45])
    places = torch.arange(57).split(counts.tolist())
    grid = torch.cartesian_prod(torch.arange(3), torch.arange(5), torch.arange(3)) + 12
    return {
        "audio_hidden_states": draw(rows, 5, 8),
        "encoder_hidden_states": draw(rows, WORDS, TEXT),
        "timestep_indices": torch.zeros(57, dtype=torch.long),
        "token_tags": torch.arange(3).repeat_interleave(counts),
        "position_ids": torch.cat([torch.arange(12)[:, None].expand(-1, 3), grid]),
        "text_indices": places[0],
        "audio_indices": places[1],
        "video_indices": places[2],
    }


COGVIDEOX = {
    "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "in_channels": 4, "out_channels": 4,
    "time_embed_dim": 8, "text_embed_dim": TEXT, "num_layers": 3, "sample_width": 6, "sample_height": 10,
    "sample_frames": 9, "max_text_seq_length": WORDS, "use_rotary_positional_embeddings": True,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "cogvideox": Family("CogVideoXTransformer3DModel", "CogVideoX, 1.5", COGVIDEOX, (3, 4, 10, 6), _cogvideox),
    "consisid": Family(
        "ConsisIDTransformer3DModel",
        "ConsisID",
        COGVIDEOX
        | {
            "num_layers": 4, "is_train_face": True, "cross_attn_interval": 2, "cross_attn_dim_head": 4,
            "cross_attn_num_heads": 2,
            "LFE_id_dim": 12, "LFE_vit_dim": 10, "LFE_depth": 2, "LFE_dim_head": 4, "LFE_num_heads": 2,
            "LFE_num_id_token": 2, "LFE_num_querie": 3, "LFE_output_dim": 16, "LFE_num_scale": 2,
        },
        (3, 4, 10, 6),
        _consisid,
    ),
    "hunyuan_video": Family(
        "HunyuanVideoTransformer3DModel",
        "HunyuanVideo",
        {
            **HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2,
            "num_refiner_layers": 1, "text_embed_dim": TEXT, "pooled_projection_dim": 10, "rope_axes_dim": (2, 2, 4),
            "image_condition_type": "token_replace",
        },
        VIDEO,
        _hunyuan_video,
    ),
    "hunyuan_video_15": Family(
        "HunyuanVideo15Transformer3DModel",
        "HunyuanVideo 1.5",
        {
            **HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 3, "num_refiner_layers": 1,
            "text_embed_dim": TEXT, "text_embed_2_dim": 12, "image_embed_dim": 10, "rope_axes_dim": (2, 2, 4),
        },
        (4, 3, 5, 3),
        _hunyuan_video_15,
    ),
    "ltx2": Family(
        "LTX2VideoTransformer3DModel",
        "LTX-2",
        {
            **HEADED, "in_channels": 8, "out_channels": 8, "cross_attention_dim": WIDTH, "audio_in_channels": 8,
            "audio_out_channels": 8, "audio_num_attention_heads": 3, "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 12, "num_layers": 3, "caption_channels": TEXT,
        },
        (45, 8),
        _ltx2,
    ),
    "mochi": Family(
        "MochiTransformer3DModel",
        "Mochi 1",
        {
            **HEADED, "num_layers": 3, "pooled_projection_dim": 12, "in_channels": 4, "text_embed_dim": TEXT,
            "time_embed_dim": 8, "max_sequence_length": WORDS,
        },
        VIDEO,
        _mochi,
    ),
    "easyanimate": Family(
        "EasyAnimateTransformer3DModel",
        "EasyAnimate 5.1",
        {
            "num_attention_heads": HEADS, "attention_head_dim": 16, "in_channels": 4, "out_channels": 4,
            "patch_size": 2, "num_layers": 3, "mmdit_layers": 2, "time_embed_dim": 8, "text_embed_dim": TEXT,
        },
        VIDEO,
        _easyanimate,
    ),
    "framepack": Family(
        "HunyuanVideoFramepackTransformer3DModel",
        "HunyuanVideo FramePack",
        {
            **HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2,
            "num_refiner_layers": 1, "text_embed_dim": TEXT, "pooled_projection_dim": 10, "rope_axes_dim": (2, 2, 4),
            "has_image_proj": True, "image_proj_dim": 10, "has_clean_x_embedder": True,
        },
        (4, 3, 8, 8),
        _framepack,
    ),
    "minimax_h3": Family(
        "MiniMaxH3Transformer3DModel",
        "MiniMax-H3",
        {
            **HEADED, "hidden_size": WIDTH, "num_layers": 3, "num_refiner_layers": 1, "ffn_dim": 32, "in_channels": 2,
            "audio_in_channels": 8, "text_dim": TEXT, "freq_dim": 16, "time_embed_hidden_dim": 16, "time_embed_dim": 8,
            "rope_freq_dim": 1,
        },
        (45, 8),
        _minimax_h3,
        timestep=lambda t: t[:1],
    ),
    "motif_video": Family(
        "MotifVideoTransformer3DModel",
        "Motif-Video",
        {
            **HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2,
            "text_embed_dim": TEXT, "rope_axes_dim": (2, 2, 4), "enable_text_cross_attention_dual": True,
            "enable_text_cross_attention_single": True,
        },
        VIDEO,
        _motif,
    ),
}  # fmt: skip
