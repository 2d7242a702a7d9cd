"""Videos: text by cross-attention."""

from collections.abc import Callable
from typing import Any

import torch

from xfuser.testing.zoo.family import HEAD_DIM, HEADED, HEADS, TEXT, VIDEO, WIDTH, WORDS, Family, Inputs, key_mask, text


def _vace(model: Any, rows: int, draw: Callable) -> Inputs:
    scales = torch.linspace(0.7, 0.4, len(model.vace_blocks))
    control = {"control_hidden_states": draw(rows, 8, 3, 10, 6), "control_hidden_states_scale": scales}
    return {"encoder_hidden_states": draw(rows, WORDS, TEXT)} | control


def _ltx(model: Any, rows: int, draw: Callable) -> Inputs:
    return {
        "encoder_hidden_states": draw(rows, WORDS, TEXT),
        "encoder_attention_mask": key_mask(rows, WORDS),
        "num_frames": 3, "height": 5, "width": 3, "rope_interpolation_scale": (0.1, 32, 32),
    }  # fmt: skip


def _allegro(model: Any, rows: int, draw: Callable) -> Inputs:
    mask = torch.ones(rows, 3, 10, 6)
    mask[0, :, 8:] = 0
    tables = []
    for positions in (3, 5, 3):
        angles = torch.arange(positions)[:, None] * torch.tensor([0.5, 1.0, 0.5, 1.0])
        tables.append((angles.cos(), angles.sin()))
    places = torch.cartesian_prod(torch.arange(3), torch.arange(5), torch.arange(3)).T[:, None]
    return {
        "encoder_hidden_states": draw(rows, WORDS, TEXT),
        "attention_mask": mask,
        "encoder_attention_mask": key_mask(rows, WORDS),
        "image_rotary_emb": (tuple(tables), tuple(places)),
    }


def _kandinsky(model: Any, rows: int, draw: Callable) -> Inputs:
    return {
        "encoder_hidden_states": draw(rows, WORDS, TEXT),
        "pooled_projections": draw(rows, 10),
        "visual_rope_pos": [torch.arange(3), torch.arange(5), torch.arange(3)],
        "text_rope_pos": torch.arange(WORDS),
    }


def _cosmos(model: Any, rows: int, draw: Callable) -> Inputs:
    return {"encoder_hidden_states": draw(rows, WORDS, TEXT), "fps": 16}


def _anyflow(model: Any, rows: int, draw: Callable) -> Inputs:
    return text(model, rows, draw) | {"r_timestep": torch.full((rows, 3), 400.0)}


def _kandinsky6(model: Any, rows: int, draw: Callable) -> Inputs:
    more = {"pooled_projections": draw(rows, 10), "audio_hidden_states": draw(rows, 5, 6)}
    return text(model, rows, draw) | more | {"encoder_attention_mask": key_mask(rows, WORDS).bool()[:, None, None]}


def _helios(model: Any, rows: int, draw: Callable) -> Inputs:
    counts = {"short": 2, "mid": 2, "long": 4}
    history = {f"latents_history_{name}": draw(rows, 4, frames, 8, 8) for name, frames in counts.items()}
    places = {f"indices_latents_history_{name}": torch.arange(frames) for name, frames in counts.items()}
    places = {
        name: at.expand(rows, -1) for name, at in (places | {"indices_hidden_states": torch.arange(3) + 8}).items()
    }
    return text(model, rows, draw) | history | places


def _wan_animate(model: Any, rows: int, draw: Callable) -> Inputs:
    return text(model, rows, draw) | {
        "pose_hidden_states": draw(rows, 4, 2, 10, 6), "face_pixel_values": draw(rows, 3, 5, 8, 8),
    }  # fmt: skip


def _sana_wm_refiner(model: Any, rows: int, draw: Callable) -> Inputs:
    tables = model.build_rotary_emb_for_absolute_positions(rows, [0, 1, 2], 5, 3, torch.device("cpu"), 24.0)
    mask = {"encoder_attention_mask": key_mask(rows, WORDS), "video_rotary_emb": tables}
    return text(model, rows, draw) | mask


def _sana_wm(model: Any, rows: int, draw: Callable) -> Inputs:
    return {"encoder_hidden_states": draw(rows, 1, WORDS, TEXT), "mask": key_mask(rows, WORDS)}


def _nothing(model: Any, rows: int, draw: Callable) -> Inputs:
    return {}


WAN = {
    "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "in_channels": 4, "out_channels": 4, "text_dim": TEXT,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 32,
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "allegro": Family(
        "AllegroTransformer3DModel",
        "Allegro",
        {
            "num_attention_heads": HEADS, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
            "num_layers": 3, "cross_attention_dim": 36, "sample_height": 10, "sample_width": 6, "sample_frames": 3,
            "caption_channels": TEXT,
        },
        VIDEO,
        _allegro,
    ),
    "cosmos": Family(
        "CosmosTransformer3DModel",
        "Cosmos Predict, Transfer",
        {
            "num_attention_heads": HEADS, "attention_head_dim": 12, "in_channels": 4, "out_channels": 4,
            "num_layers": 3, "mlp_ratio": 2.0, "text_embed_dim": TEXT,
            "adaln_lora_dim": 4, "max_size": (4, 12, 12), "rope_scale": (2.0, 1.0, 1.0), "concat_padding_mask": False,
        },
        VIDEO,
        _cosmos,
    ),
    "kandinsky5": Family(
        "Kandinsky5Transformer3DModel",
        "Kandinsky 5",
        {
            "in_visual_dim": 4, "in_text_dim": TEXT, "in_text_dim2": 10, "time_dim": 8, "out_visual_dim": 4,
            "model_dim": WIDTH, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 3, "axes_dims": (4, 2, 2),
        },
        (3, 10, 6, 4),
        _kandinsky,
    ),
    "latte": Family(
        "LatteTransformer3DModel",
        "Latte",
        {
            **HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 2, "cross_attention_dim": WIDTH,
            "sample_size": 10, "patch_size": 2, "norm_type": "ada_norm_single", "caption_channels": TEXT,
            "video_length": 3, "num_embeds_ada_norm": 1000, "attention_bias": True, "norm_elementwise_affine": False,
        },
        (4, 3, 10, 6),
        text,
    ),
    "ltx": Family(
        "LTXVideoTransformer3DModel",
        "LTX-Video",
        {
            **HEADED, "in_channels": 8, "out_channels": 8, "cross_attention_dim": WIDTH, "num_layers": 3,
            "caption_channels": TEXT,
        },
        (45, 8),
        _ltx,
    ),
    "skyreels_v2": Family(
        "SkyReelsV2Transformer3DModel", "SkyReels-V2", WAN | {"num_frame_per_block": 2}, (4, 4, 10, 6), text
    ),
    "wan": Family("WanTransformer3DModel", "Wan 2.1, 2.2", WAN, VIDEO, text),
    "wan_vace": Family(
        "WanVACETransformer3DModel", "Wan VACE", WAN | {"vace_layers": [0, 2], "vace_in_channels": 8}, VIDEO, _vace
    ),
    "anyflow": Family(
        "AnyFlowTransformer3DModel",
        "AnyFlow",
        WAN,
        (3, 4, 10, 6),
        _anyflow,
        timestep=lambda t: t[:, None].expand(-1, 3),
    ),
    "chronoedit": Family("ChronoEditTransformer3DModel", "ChronoEdit", WAN, VIDEO, text),
    "helios": Family(
        "HeliosTransformer3DModel",
        "Helios",
        {name: value for name, value in WAN.items() if name != "rope_max_seq_len"}
        | {"rope_dim": (4, 2, 2), "is_amplify_history": True},
        (4, 3, 8, 8),
        _helios,
    ),
    "kandinsky6": Family(
        "Kandinsky6Transformer3DModel",
        "Kandinsky 6",
        {
            "in_visual_dim": 4, "out_visual_dim": 4, "in_text_dim": TEXT, "in_text_dim2": 10, "time_dim": 8,
            "model_dim": WIDTH, "ff_dim": 32, "num_text_blocks": 1, "num_visual_blocks": 3, "axes_dims": (4, 2, 2),
            "visual_cond": False, "in_audio_dim": 6, "out_audio_dim": 6, "model_dim_a": 16, "axes_dims_a": (4, 2, 2),
            "ca_rope": True,
        },
        (3, 10, 6, 4),
        _kandinsky6,
    ),
    "sana_video": Family(
        "SanaVideoTransformer3DModel",
        "Sana-Video",
        {
            **HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 3, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12, "cross_attention_dim": WIDTH, "caption_channels": TEXT, "mlp_ratio": 2.0,
        },
        (4, 5, 10, 6),
        text,
    ),
    "wan_animate": Family(
        "WanAnimateTransformer3DModel",
        "Wan Animate",
        WAN
        | {
            "in_channels": 12, "out_channels": 12, "latent_channels": 4, "image_dim": None,
            "motion_encoder_channel_sizes": {"4": 4, "8": 4}, "motion_encoder_size": 8, "motion_style_dim": 8,
            "motion_dim": 4, "motion_encoder_dim": 8, "face_encoder_hidden_dim": 8,
            "face_encoder_num_heads": 2, "inject_face_latents_blocks": 2, "num_layers": 4,
        },
        (12, 3, 10, 6),
        _wan_animate,
    ),
    "sana_wm_refiner": Family(
        "SanaWMLTX2RefinerTransformer3DModel",
        "the refiner of SANA-WM",
        {
            **HEADED, "in_channels": 8, "out_channels": 8, "cross_attention_dim": WIDTH, "audio_in_channels": 8,
            "audio_out_channels": 8, "audio_num_attention_heads": 3, "audio_attention_head_dim": 4,
            "audio_cross_attention_dim": 12, "num_layers": 3, "caption_channels": TEXT,
        },
        (45, 8),
        _sana_wm_refiner,
    ),
    "kandinsky6_sr": Family(
        "Kandinsky6SRTransformer3DModel",
        "Kandinsky 6's upscaler",
        {
            "in_visual_dim": 4, "out_visual_dim": 9, "time_dim": 8, "model_dim": 3 * 16, "ff_dim": 32,
            "num_visual_blocks": 3, "axes_dims": (8, 4, 4), "nabla_window": (1, 1, 1),
        },
        (3, 8, 16, 9),
        _nothing,
    ),
    "sana_wm": Family(
        "SanaWMTransformer3DModel",
        "SANA-WM",
        {
            "in_channels": 4, "num_layers": 4, "hidden_size": WIDTH, "num_attention_heads": HEADS, "softmax_every_n": 2,
            "linear_head_dim": HEAD_DIM, "caption_channels": TEXT, "cam_attn_compress": 1,
        },
        (4, 3, 5, 3),
        _sana_wm,
        timestep=lambda t: t[:, None, None].expand(-1, 1, 3),
        scaled=False,
    ),
}  # fmt: skip
