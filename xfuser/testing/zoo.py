"""Tiny transformers of every known class with random weights, and the inputs of a denoising loop for each.

Sizes are awkward on purpose: 3 heads, odd text lengths, token counts that nothing divides.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import diffusers
import torch

HEADS, HEAD_DIM = 3, 8
WIDTH = HEADS * HEAD_DIM
TEXT = 16  # features of a text token
WORDS = 7  # text tokens

PROJECTIONS = ("to_q", "to_k", "to_qkv_mlp_proj", "add_q_proj", "add_k_proj", "to_query", "to_key", "to_q_t", "to_k_t")

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Family:
    """One transformer class.

    Attributes:
        cls: its name in Diffusers.
        models: what people know that runs on it.
        config: of the tiny transformer.
        latents: shape of one row of latents.
        conditions: ``(transformer, rows, draw)`` to the other arguments of the forward but the time; ``draw(*shape)``
            gives seeded noise, of which row after row is different.
        time: the argument with the time, and a function from it, ``[rows]`` in (0, 1000], to what the class takes.
        scaled: whether projections are scaled up; not where attention is felt anyway, and rounding would be, too.
    """

    cls: str
    models: str
    config: dict[str, Any]
    latents: tuple[int, ...]
    conditions: Callable[[Any, int, Callable[..., torch.Tensor]], Inputs]
    time: str = "timestep"
    timestep: Callable[[torch.Tensor], torch.Tensor] = lambda t: t
    scaled: bool = True

    @property
    def present(self) -> bool:
        """Whether the installed Diffusers has the class."""
        return hasattr(diffusers, self.cls)

    def build(self) -> Any:
        """The transformer, with attention that matters: queries and keys are scaled up."""
        torch.manual_seed(0)
        model = getattr(diffusers, self.cls)(**self.config).eval().requires_grad_(False)
        for name, weight in model.named_parameters():
            _make_felt(name, weight, self.scaled)
        return model


def _make_felt(name: str, weight: torch.Tensor, scaled: bool) -> None:
    """Undo initialisations with zeros, as of gates, or with nothing, and scale queries and keys up."""
    if not weight.any() or name.endswith(("scale_shift_table", "pad_token")):
        torch.nn.init.normal_(weight, std=0.3)
    if not scaled:
        return
    if weight.dim() == 2 and name.endswith(tuple(f"{kind}.weight" for kind in PROJECTIONS)):
        weight.data.mul_(4)
    if weight.dim() == 2 and name.endswith(("to_v.weight", "add_v_proj.weight", "norm1.linear.weight")):
        weight.data.mul_(3)


def _text(model: Any, rows: int, draw: Callable) -> Inputs:
    return {"encoder_hidden_states": draw(rows, WORDS, TEXT)}


def _mask(rows: int, words: int | None = None) -> torch.Tensor:
    """``[rows, words]`` of which the last ones are 0: two in the first row, one less in each of the next."""
    words = words or WORDS
    hidden = min(2, words - 1)
    mask = torch.ones(rows, words, dtype=torch.long)
    for row in range(rows):
        mask[row, words - max(hidden - row, 0) :] = 0
    return mask


def _cogvideox(model: Any, rows: int, draw: Callable) -> Inputs:
    angles = torch.arange(45, dtype=torch.float32)[:, None] * torch.linspace(0.1, 1, HEAD_DIM)
    return {"encoder_hidden_states": draw(rows, WORDS, TEXT), "image_rotary_emb": (angles.cos(), angles.sin())}


def _consisid(model: Any, rows: int, draw: Callable) -> Inputs:
    faces = {"id_cond": draw(rows, 12), "id_vit_hidden": [draw(rows, 5, 10) for _ in range(2)]}
    return _cogvideox(model, rows, draw) | faces


def _vace(model: Any, rows: int, draw: Callable) -> Inputs:
    control = {"control_hidden_states": draw(rows, 8, 3, 10, 6), "control_hidden_states_scale": torch.tensor([0.7])}
    return {"encoder_hidden_states": draw(rows, WORDS, TEXT)} | control


def _hunyuan_video(model: Any, rows: int, draw: Callable) -> Inputs:
    return {
        "encoder_hidden_states": draw(rows, WORDS, TEXT),
        "encoder_attention_mask": _mask(rows),
        "pooled_projections": draw(rows, 10),
        "guidance": torch.full((rows,), 3000.0),
    }


def _hunyuan_video_15(model: Any, rows: int, draw: Callable) -> Inputs:
    return {
        "encoder_hidden_states": draw(rows, WORDS, TEXT),
        "encoder_attention_mask": _mask(rows),
        "encoder_hidden_states_2": draw(rows, 4, 12),
        "encoder_attention_mask_2": _mask(rows, 4),
        "image_embeds": draw(rows, 3, 10),
    }


def _hunyuan_image(model: Any, rows: int, draw: Callable) -> Inputs:
    return {
        "encoder_hidden_states": draw(rows, WORDS, TEXT),
        "encoder_attention_mask": _mask(rows),
        "encoder_hidden_states_2": draw(rows, 4, 12),
        "encoder_attention_mask_2": _mask(rows, 4),
    }


def _ltx(model: Any, rows: int, draw: Callable) -> Inputs:
    return {
        "encoder_hidden_states": draw(rows, WORDS, TEXT),
        "encoder_attention_mask": _mask(rows),
        "num_frames": 3, "height": 5, "width": 3, "rope_interpolation_scale": (0.1, 32, 32),
    }  # fmt: skip


def _ltx2(model: Any, rows: int, draw: Callable) -> Inputs:
    return {
        "audio_hidden_states": draw(rows, 5, 8),
        "encoder_hidden_states": draw(rows, WORDS, TEXT),
        "audio_encoder_hidden_states": draw(rows, WORDS, TEXT),
        "encoder_attention_mask": _mask(rows),
        "audio_encoder_attention_mask": _mask(rows),
        "num_frames": 3, "height": 5, "width": 3, "fps": 24.0, "audio_num_frames": 5,
    }  # fmt: skip


def _mochi(model: Any, rows: int, draw: Callable) -> Inputs:
    return {"encoder_hidden_states": draw(rows, WORDS, TEXT), "encoder_attention_mask": _mask(rows).bool()}


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
        "encoder_attention_mask": _mask(rows),
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
    mask = torch.cat([_mask(rows).bool(), torch.ones(rows, 15, dtype=torch.bool)], dim=1)
    return {name: inputs[name] for name in ("encoder_hidden_states", "img_ids", "txt_ids")} | {"attention_mask": mask}


def _qwen(model: Any, rows: int, draw: Callable) -> Inputs:
    inputs = {
        "encoder_hidden_states": draw(rows, WORDS, TEXT),
        "encoder_hidden_states_mask": _mask(rows).bool(),
        "img_shapes": [[(1, 5, 3)]] * rows,
    }
    if "txt_seq_lens" in inspect.signature(type(model).forward).parameters:  # in releases of old, which take no mask
        inputs |= {"txt_seq_lens": [WORDS] * rows}
    return inputs


def _z_image(model: Any, rows: int, draw: Callable) -> Inputs:
    words = draw(rows, WORDS, TEXT)
    return {"cap_feats": [words[row, : WORDS - row] for row in range(rows)]}


def _lumina2(model: Any, rows: int, draw: Callable) -> Inputs:
    return {"encoder_hidden_states": draw(rows, WORDS, TEXT), "encoder_attention_mask": _mask(rows)}


def _cogview(model: Any, rows: int, draw: Callable) -> Inputs:
    sizes = {name: torch.full((rows, 2), 80.0) for name in ("original_size", "target_size", "crop_coords")}
    return {"encoder_hidden_states": draw(rows, WORDS, TEXT)} | sizes


def _hidream(model: Any, rows: int, draw: Callable) -> Inputs:
    return {
        "encoder_hidden_states_t5": draw(rows, 4, TEXT),
        "encoder_hidden_states_llama3": torch.stack([draw(rows, 5, TEXT) for _ in range(2)]),
        "pooled_embeds": draw(rows, 10),
    }


def _krea2(model: Any, rows: int, draw: Callable) -> Inputs:
    image = torch.cartesian_prod(torch.arange(1), torch.arange(5), torch.arange(3))
    return {
        "encoder_hidden_states": torch.stack([draw(rows, WORDS, TEXT) for _ in range(2)], dim=2),
        "position_ids": torch.cat([torch.zeros(WORDS, 3), image.float()]),
        "encoder_attention_mask": _mask(rows).bool(),
    }


def _unet(model: Any, rows: int, draw: Callable) -> Inputs:
    added = {"text_embeds": draw(rows, 8), "time_ids": 10 * draw(rows, 6)}
    return {"encoder_hidden_states": draw(rows, WORDS, TEXT), "added_cond_kwargs": added}


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


def _pixart(model: Any, rows: int, draw: Callable) -> Inputs:
    conditions = {"resolution": None, "aspect_ratio": None}
    inputs = {"encoder_hidden_states": draw(rows, WORDS, TEXT), "encoder_attention_mask": _mask(rows)}
    return inputs | {"added_cond_kwargs": conditions}


def _sd3(model: Any, rows: int, draw: Callable) -> Inputs:
    return {"encoder_hidden_states": draw(rows, WORDS, TEXT), "pooled_projections": draw(rows, 16)}


def _dit(model: Any, rows: int, draw: Callable) -> Inputs:
    return {"class_labels": torch.arange(rows)}


def _hunyuan_dit(model: Any, rows: int, draw: Callable) -> Inputs:
    angles = torch.arange(15, dtype=torch.float32)[:, None] * torch.linspace(0.1, 1, HEAD_DIM)
    return {
        "encoder_hidden_states": draw(rows, 7, 8),
        "text_embedding_mask": _mask(rows),
        "encoder_hidden_states_t5": draw(rows, 5, TEXT),
        "text_embedding_mask_t5": _mask(rows, 5),
        "image_meta_size": None,
        "style": None,
        "image_rotary_emb": (angles.cos(), angles.sin()),
    }


WAN = {
    "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "in_channels": 4, "out_channels": 4, "text_dim": TEXT,
    "freq_dim": 16, "ffn_dim": 32, "num_layers": 3, "rope_max_seq_len": 32,
}  # fmt: skip
COGVIDEOX = {
    "num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM, "in_channels": 4, "out_channels": 4,
    "time_embed_dim": 8, "text_embed_dim": TEXT, "num_layers": 3, "sample_width": 6, "sample_height": 10,
    "sample_frames": 9, "max_text_seq_length": WORDS, "use_rotary_positional_embeddings": True,
}  # fmt: skip
HEADED = {"num_attention_heads": HEADS, "attention_head_dim": HEAD_DIM}
FRACTION: Callable[[torch.Tensor], torch.Tensor] = lambda t: t / 1000  # noqa: E731
VIDEO = (4, 3, 10, 6)  # 45 tokens

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
    "auraflow": Family(
        "AuraFlowTransformer2DModel",
        "AuraFlow",
        {
            **HEADED, "sample_size": 8, "num_mmdit_layers": 2, "num_single_dit_layers": 2, "joint_attention_dim": TEXT,
            "caption_projection_dim": WIDTH, "pos_embed_max_size": 64,
        },
        (4, 10, 6),
        _text,
        timestep=FRACTION,
    ),
    "chroma": Family(
        "ChromaTransformer2DModel",
        "Chroma",
        {
            **HEADED, "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": TEXT,
            "axes_dims_rope": (4, 2, 2), "approximator_num_channels": 8, "approximator_hidden_dim": 16,
            "approximator_layers": 1,
        },
        (15, 8),
        _chroma,
        timestep=FRACTION,
    ),
    "cogvideox": Family("CogVideoXTransformer3DModel", "CogVideoX, 1.5", COGVIDEOX, (3, 4, 10, 6), _cogvideox),
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
    "flux": Family(
        "FluxTransformer2DModel",
        "Flux.1, Kontext, Fill, Control",
        {
            **HEADED, "in_channels": 8, "num_layers": 2, "num_single_layers": 2, "joint_attention_dim": TEXT,
            "pooled_projection_dim": 8, "guidance_embeds": True, "axes_dims_rope": (4, 2, 2),
        },
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
    "latte": Family(
        "LatteTransformer3DModel",
        "Latte",
        {
            **HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 2, "cross_attention_dim": WIDTH,
            "sample_size": 10, "patch_size": 2, "norm_type": "ada_norm_single", "caption_channels": TEXT,
            "video_length": 3, "num_embeds_ada_norm": 1000, "attention_bias": True, "norm_elementwise_affine": False,
        },
        (4, 3, 10, 6),
        _text,
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
    "sana": Family(
        "SanaTransformer2DModel",
        "Sana, Sana-Sprint",
        {
            **HEADED, "in_channels": 4, "out_channels": 4, "num_layers": 3, "num_cross_attention_heads": 2,
            "cross_attention_head_dim": 12, "cross_attention_dim": WIDTH, "caption_channels": TEXT, "mlp_ratio": 2.0,
            "sample_size": 8,
        },
        (4, 5, 3),
        _text,
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
    "skyreels_v2": Family(
        "SkyReelsV2Transformer3DModel", "SkyReels-V2", WAN | {"num_frame_per_block": 2}, (4, 4, 10, 6), _text
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
    "wan": Family("WanTransformer3DModel", "Wan 2.1, 2.2", WAN, VIDEO, _text),
    "wan_vace": Family(
        "WanVACETransformer3DModel", "Wan VACE", WAN | {"vace_layers": [0], "vace_in_channels": 8}, VIDEO, _vace
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
}  # fmt: skip
