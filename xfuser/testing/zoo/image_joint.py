"""Images: text and image attend to each other as two streams."""

import inspect
from collections.abc import Callable
from typing import Any

import torch

from xfuser.testing.zoo.family import FRACTION, HEADED, HEADS, TEXT, WIDTH, WORDS, Family, Inputs, key_mask, text


def _hunyuan_image(model: Any, rows: int, draw: Callable) -> Inputs:
    return {
        "encoder_hidden_states": draw(rows, WORDS, TEXT),
        "encoder_attention_mask": key_mask(rows, WORDS),
        "encoder_hidden_states_2": draw(rows, 4, 12),
        "encoder_attention_mask_2": key_mask(rows, 4),
    }


def _flux2(model: Any, rows: int, draw: Callable) -> Inputs:
    places = torch.cartesian_prod(torch.arange(1), torch.arange(5), torch.arange(3), torch.arange(1))
    words = torch.cartesian_prod(torch.arange(1), torch.arange(1), torch.arange(1), torch.arange(WORDS))
    return {
        "encoder_hidden_states": draw(rows, WORDS, TEXT),
        "img_ids": places[None].expand(rows, -1, -1).float(),
        "txt_ids": words[None].expand(rows, -1, -1).float(),
        "guidance": torch.full((rows,), 3.0),
    }


def _flux(model: Any, rows: int, draw: Callable) -> Inputs:
    return {
        "encoder_hidden_states": draw(rows, WORDS, TEXT),
        "pooled_projections": draw(rows, 8),
        "img_ids": torch.cartesian_prod(torch.arange(1), torch.arange(5), torch.arange(3)).float(),
        "txt_ids": torch.zeros(WORDS, 3),
        "guidance": torch.full((rows,), 3.0),
    }


def _chroma(model: Any, rows: int, draw: Callable) -> Inputs:
    inputs = _flux(model, rows, draw)
    mask = torch.cat([key_mask(rows, WORDS).bool(), torch.ones(rows, 15, dtype=torch.bool)], dim=1)
    return {name: inputs[name] for name in ("encoder_hidden_states", "img_ids", "txt_ids")} | {"attention_mask": mask}


def _qwen(model: Any, rows: int, draw: Callable) -> Inputs:
    inputs = {
        "encoder_hidden_states": draw(rows, WORDS, TEXT),
        "encoder_hidden_states_mask": key_mask(rows, WORDS).bool(),
        "img_shapes": [[(1, 5, 3)]] * rows,
    }
    if "txt_seq_lens" in inspect.signature(type(model).forward).parameters:  # older releases, which take no mask
        inputs |= {"txt_seq_lens": [WORDS] * rows}
    return inputs


def _cogview(model: Any, rows: int, draw: Callable) -> Inputs:
    sizes = {name: torch.full((rows, 2), 80.0) for name in ("original_size", "target_size", "crop_coords")}
    return {"encoder_hidden_states": draw(rows, WORDS, TEXT)} | sizes


def _hidream(model: Any, rows: int, draw: Callable) -> Inputs:
    return {
        "encoder_hidden_states_t5": draw(rows, 4, TEXT),
        "encoder_hidden_states_llama3": torch.stack([draw(rows, 5, TEXT) for _ in range(2)]),
        "pooled_embeds": draw(rows, 10),
    }


def _sd3(model: Any, rows: int, draw: Callable) -> Inputs:
    return {"encoder_hidden_states": draw(rows, WORDS, TEXT), "pooled_projections": draw(rows, 16)}


def _bria(model: Any, rows: int, draw: Callable) -> Inputs:
    inputs = _flux(model, rows, draw)
    return {name: inputs[name] for name in ("encoder_hidden_states", "img_ids", "txt_ids")}


def _bria_fibo(model: Any, rows: int, draw: Callable) -> Inputs:
    layers = len(model.transformer_blocks) + len(model.single_transformer_blocks)
    mask = torch.cat([key_mask(rows, WORDS).bool(), torch.ones(rows, 15, dtype=torch.bool)], dim=1)
    return _bria(model, rows, draw) | {
        "text_encoder_layers": [draw(rows, WORDS, 10) for _ in range(layers)],
        "joint_attention_kwargs": {"attention_mask": mask[:, None, None]},
    }


def _prx(model: Any, rows: int, draw: Callable) -> Inputs:
    return text(model, rows, draw) | {"attention_mask": key_mask(rows, WORDS)}


def _glm_image(model: Any, rows: int, draw: Callable) -> Inputs:
    sizes = {name: torch.full((rows, 2), 80.0) for name in ("target_size", "crop_coords")}
    prior = {"prior_token_id": torch.arange(15).expand(rows, -1), "prior_token_drop": torch.arange(rows) % 2 > 0}
    return text(model, rows, draw) | sizes | prior


def _joyimage_plus(model: Any, rows: int, draw: Callable) -> Inputs:
    shapes = {"shape_list": [[(1, 3, 3), (1, 2, 3)], [(1, 3, 3), (1, 2, 2)]] * rows}
    shapes["shape_list"] = shapes["shape_list"][:rows]
    return text(model, rows, draw) | {"encoder_hidden_states_mask": key_mask(rows, WORDS)} | shapes


def _flux3(model: Any, rows: int, draw: Callable) -> Inputs:
    inputs = _flux2(model, rows, draw)
    return {"encoder_hidden_states": inputs["encoder_hidden_states"]} | {
        name: inputs[name][0] for name in ("img_ids", "txt_ids")
    }


def _nucleus(model: Any, rows: int, draw: Callable) -> Inputs:
    mask = {"encoder_hidden_states_mask": key_mask(rows, WORDS).bool(), "img_shapes": [(1, 5, 3)] * rows}
    return text(model, rows, draw) | mask


FLUX_LIKE = HEADED | {
    "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": TEXT, "axes_dims_rope": (4, 2, 2),
}  # fmt: skip

FAMILIES: dict[str, Family] = {
    "auraflow": Family(
        "AuraFlowTransformer2DModel",
        "AuraFlow",
        {
            **HEADED, "sample_size": 8, "num_mmdit_layers": 2, "num_single_dit_layers": 2, "joint_attention_dim": TEXT,
            "caption_projection_dim": WIDTH, "pos_embed_max_size": 64,
        },
        (4, 10, 6),
        text,
        timestep=FRACTION,
    ),
    "chroma": Family(
        "ChromaTransformer2DModel",
        "Chroma",
        FLUX_LIKE | {"approximator_num_channels": 8, "approximator_hidden_dim": 16, "approximator_layers": 1},
        (15, 8),
        _chroma,
        timestep=FRACTION,
    ),
    "cogview3": Family(
        "CogView3PlusTransformer2DModel",
        "CogView3-Plus",
        {
            **HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 3, "text_embed_dim": TEXT, "time_embed_dim": 8,
            "condition_dim": 8, "pos_embed_max_size": 16, "sample_size": 8,
        },
        (4, 10, 6),
        _cogview,
    ),
    "cogview4": Family(
        "CogView4Transformer2DModel",
        "CogView4",
        {
            **HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 3, "text_embed_dim": TEXT, "time_embed_dim": 8,
            "condition_dim": 8, "pos_embed_max_size": 16, "sample_size": 8, "rope_axes_dim": (16, 16),
        },
        (4, 10, 6),
        _cogview,
    ),
    "flux": Family(
        "FluxTransformer2DModel",
        "Flux.1, Kontext, Fill, Control",
        FLUX_LIKE | {"pooled_projection_dim": 8, "guidance_embeds": True},
        (15, 8),
        _flux,
        timestep=FRACTION,
    ),
    "flux2": Family(
        "Flux2Transformer2DModel",
        "Flux.2, klein",
        {
            **HEADED, "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": TEXT,
            "timestep_guidance_channels": 16, "axes_dims_rope": (2, 2, 2, 2),
        },
        (15, 8),
        _flux2,
        timestep=FRACTION,
    ),
    "hidream": Family(
        "HiDreamImageTransformer2DModel",
        "HiDream-I1",
        {
            **HEADED, "patch_size": 2, "in_channels": 4, "num_layers": 2, "num_single_layers": 2,
            "caption_channels": [TEXT, TEXT], "text_emb_dim": 10, "num_routed_experts": 2, "num_activated_experts": 1,
            "axes_dims_rope": (4, 2, 2), "max_resolution": (12, 6), "llama_layers": [0, 1, 0, 1],
        },
        (4, 10, 6),
        _hidream,
        "timesteps",
    ),
    "hunyuan_image": Family(
        "HunyuanImageTransformer2DModel",
        "HunyuanImage 2.1",
        {
            **HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 2, "num_single_layers": 2,
            "num_refiner_layers": 1, "text_embed_dim": TEXT, "text_embed_2_dim": 12, "rope_axes_dim": (4, 4),
        },
        (4, 5, 3),
        _hunyuan_image,
    ),
    "qwen_image": Family(
        "QwenImageTransformer2DModel",
        "Qwen-Image, Edit, Layered",
        {
            **HEADED, "in_channels": 8, "out_channels": 2, "num_layers": 3, "joint_attention_dim": TEXT,
            "axes_dims_rope": (4, 2, 2),
        },
        (15, 8),
        _qwen,
        timestep=FRACTION,
    ),
    "sd3": Family(
        "SD3Transformer2DModel",
        "Stable Diffusion 3, 3.5",
        {
            **HEADED, "sample_size": 8, "in_channels": 4, "out_channels": 4, "num_layers": 3,
            "joint_attention_dim": TEXT, "caption_projection_dim": WIDTH, "pooled_projection_dim": 16,
            "pos_embed_max_size": 16, "dual_attention_layers": (0,), "qk_norm": "rms_norm",
        },
        (4, 10, 6),
        _sd3,
    ),
    "bria": Family(
        "BriaTransformer2DModel",
        "Bria 3.2",
        FLUX_LIKE,
        (15, 8),
        _bria,
    ),
    "bria_fibo": Family(
        "BriaFiboTransformer2DModel",
        "Bria FIBO",
        FLUX_LIKE | {"text_encoder_dim": 10},
        (15, 8),
        _bria_fibo,
    ),
    "glm_image": Family(
        "GlmImageTransformer2DModel",
        "GLM-Image",
        {
            **HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 3, "text_embed_dim": TEXT, "time_embed_dim": 8,
            "condition_dim": 8, "prior_vq_quantizer_codebook_size": 16,
        },
        (4, 10, 6),
        _glm_image,
    ),
    "joyimage_edit": Family(
        "JoyImageEditTransformer3DModel",
        "JoyImage Edit",
        {
            "in_channels": 4, "hidden_size": WIDTH, "num_attention_heads": HEADS, "text_dim": TEXT, "num_layers": 3,
            "rope_dim_list": [4, 2, 2], "rope_type": "mrope",
        },
        (4, 3, 10, 6),
        text,
    ),
    "joyimage_edit_plus": Family(
        "JoyImageEditPlusTransformer3DModel",
        "JoyImage Edit Plus",
        {
            "in_channels": 4, "hidden_size": WIDTH, "num_attention_heads": HEADS, "text_dim": TEXT, "num_layers": 3,
            "rope_dim_list": [4, 2, 2],
        },
        (15, 4, 1, 2, 2),
        _joyimage_plus,
    ),
    "longcat_image": Family(
        "LongCatImageTransformer2DModel",
        "LongCat-Image, Edit",
        FLUX_LIKE | {"pooled_projection_dim": 8},
        (15, 8),
        _bria,
        timestep=FRACTION,
    ),
    "ovis_image": Family(
        "OvisImageTransformer2DModel",
        "Ovis-Image",
        FLUX_LIKE | {"out_channels": 8},
        (15, 8),
        _bria,
        timestep=FRACTION,
    ),
    "prx": Family(
        "PRXTransformer2DModel",
        "PRX",
        {
            "in_channels": 4, "context_in_dim": TEXT, "hidden_size": WIDTH, "num_heads": HEADS, "depth": 3,
            "axes_dim": [4, 4],
        },
        (4, 10, 6),
        _prx,
        timestep=FRACTION,
    ),
    "flux3": Family(
        "Flux3Transformer2DModel",
        "Flux.3",
        {
            **HEADED, "in_channels": 8, "cond_in_channels": 8, "num_layers": 1, "num_single_layers": 3,
            "joint_attention_dim": TEXT, "timestep_channels": 16, "axes_dims_rope": (2, 2, 2, 2),
        },
        (15, 8),
        _flux3,
        timestep=FRACTION,
    ),
    "nucleus_moe": Family(
        "NucleusMoEImageTransformer2DModel",
        "Nucleus-Image",
        {
            **HEADED, "in_channels": 8, "out_channels": 8, "patch_size": 1, "num_layers": 3, "num_key_value_heads": 1,
            "joint_attention_dim": TEXT, "axes_dims_rope": (4, 2, 2), "dense_moe_strategy": "leave_first_block_dense",
            "num_experts": 4, "moe_intermediate_dim": 16, "capacity_factors": 2.0, "mlp_ratio": 8.0,
        },
        (15, 8),
        _nucleus,
        timestep=FRACTION,
    ),
}  # fmt: skip
