"""Tiny whole pipelines of the model zoo: the real classes, saved as folders, and a short call of each.

Transformers are those of the matrix (``xfuser.testing.zoo``), with the channels that a pipeline needs. Text encoders
with long configurations are omitted: the call passes their embeddings.
"""

from functools import cache
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import running
import tiny
import torch
from diffusers import DDIMScheduler, DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
from newer import NEWER
from parts import (
    EMBEDS,
    FRAMES,
    LARGE,
    MASKED,
    QWEN_VAE,
    Parts,
    Whole,
    clip_vision,
    coded,
    flux_text,
    kl,
    picture,
    rows,
    shifting,
    small_pictures,
    t5,
    transformer,
)
from PIL import Image

from xfuser.testing import oracle
from xfuser.testing.zoo import TEXT, WIDTH, WORDS


def built(name: str) -> Any:
    """Build a whole pipeline with seeded weights."""
    spec, cls = WHOLE[name], getattr(diffusers, WHOLE[name].cls)
    parts: Parts = dict.fromkeys(cls._get_signature_keys(cls)[0])
    torch.manual_seed(0)
    parts |= {"transformer": transformer(spec.family, **spec.config), "vae": spec.vae()}
    parts |= {"scheduler": FlowMatchEulerDiscreteScheduler()} | spec.parts() | spec.unsaved()
    return cls(**parts)


def save(name: str, folder: Path) -> str:
    path = folder / name
    if not path.exists():
        built(name).save_pretrained(path)
    return str(path)


def call_of(name: str, **changes: Any) -> Parts:
    spec = WHOLE[name]
    generator = torch.Generator().manual_seed(7)
    size = {"height": 80, "width": 48} if spec.sized else {}
    call: Parts = size | {"num_inference_steps": 3, "output_type": "np"}
    for embeds, shape in spec.text.items():
        for twin in (embeds, f"negative_{embeds}")[: 1 + spec.negative]:
            call[twin] = (
                torch.randn(1, *shape, generator=generator).to(spec.dtype)
                if "mask" not in embeds
                else (torch.arange(shape[0]) < shape[0] - 2 + ("negative" in twin)).long()[None]
            )
    if not spec.text and spec.prompted:
        call |= {"prompt": tiny.PROMPT} | ({"negative_prompt": "the cat"} if spec.negative else {})
    return call | spec.call() | changes


@cache
def drawn(path: str, name: str) -> list[np.ndarray]:
    """Return the result of the unwrapped pipeline."""
    return draw(path, name, None)


@cache
def loaded(path: str, name: str) -> Any:
    """Load a saved pipeline; components that were None are not in the folder, and must be passed as None."""
    cls = getattr(diffusers, WHOLE[name].cls)
    absent = {part: None for part in cls._get_signature_keys(cls)[0] if not Path(path, part).exists()}
    pipe = diffusers.DiffusionPipeline.from_pretrained(path, dtype=WHOLE[name].dtype, **absent | WHOLE[name].unsaved())
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(path: str, name: str, degrees: Any, **changes: Any) -> list[np.ndarray]:
    """Return all results of a call."""
    pipe = running.wrap(loaded(path, name), degrees)
    with WHOLE[name].within():
        result = pipe(**call_of(name, **changes), generator=running.seeded())
    running.unwrap(pipe)
    return [np.asarray(one) for one in result.values()]


def displaced(path: str, name: str, patches: int, warmup: int = 1, **changes: Any) -> list[np.ndarray]:
    """Return the result of the PipeFusion oracle."""
    with oracle.displaced(loaded(path, name), patches, warmup):
        return draw(path, name, None, **changes)


THRICE = (True, True, True, False)
LTX_VAE = coded(
    "AutoencoderKLLTXVideo", patch_size=4, spatio_temporal_scaling=THRICE, decoder_spatio_temporal_scaling=THRICE
)
DC = coded(
    "AutoencoderDC",
    **{
        f"{way}_{key}": value
        for way in ("encoder", "decoder")
        for key, value in {
            "block_types": ("ResBlock",) * 5 + ("EfficientViTBlock",),
            "block_out_channels": (8,) * 6,
            "qkv_multiscales": ((),) * 5 + ((5,),),
            "layers_per_block": (1,) * 6,
        }.items()
    },
)
LTX_CALL = LARGE | {"max_sequence_length": WORDS}
TWO_TEXTS = EMBEDS | {"prompt_embeds_mask": (WORDS,), "prompt_embeds_2": (4, 12), "prompt_embeds_mask_2": (4,)}
ONE_FRAME_BLOCKS = {"num_frame_per_block": 1}


def karras() -> Parts:
    return {"scheduler": FlowMatchEulerDiscreteScheduler(use_karras_sigmas=True)}


def allegro_vae() -> Any:
    return diffusers.AutoencoderKLAllegro(
        block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=2, latent_channels=4
    )


def hunyuan_image_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanImage(
        in_channels=3, out_channels=3, latent_channels=4, block_out_channels=(32,) * 4, layers_per_block=1,
        spatial_compression_ratio=8, sample_size=64, scaling_factor=0.5,
    )  # fmt: skip


def hunyuan_video_15_vae() -> Any:
    return diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(16,) * 4, layers_per_block=1, spatial_compression_ratio=8,
        temporal_compression_ratio=4, scaling_factor=0.5,
    )  # fmt: skip


def ltx2_vae() -> Any:
    return diffusers.AutoencoderKLLTX2Video(
        latent_channels=8, block_out_channels=(8,) * 4, decoder_block_out_channels=(8,) * 3, layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 4, spatial_compression_ratio=32, temporal_compression_ratio=4,
    )  # fmt: skip


def ltx2_sound() -> Parts:
    from diffusers.pipelines.ltx2 import LTX2TextConnectors, LTX2Vocoder  # missing in older releases

    heads = {f"{kind}_connector_{key}": value for kind in ("video", "audio") for key, value in {
        "num_attention_heads": 2, "attention_head_dim": 8, "num_layers": 1, "num_learnable_registers": None
    }.items()}  # fmt: skip
    return shifting() | {
        "audio_vae": diffusers.AutoencoderKLLTX2Audio(
            base_channels=8, ch_mult=(1, 1, 1), latent_channels=2, mel_bins=16, num_res_blocks=1
        ),
        "connectors": LTX2TextConnectors(caption_channels=TEXT, text_proj_in_factor=1, **heads),
        "vocoder": LTX2Vocoder(in_channels=32, hidden_channels=16, upsample_kernel_sizes=[4], upsample_factors=[2]),
    }


def cosmos_vae() -> Any:
    return diffusers.AutoencoderKLCosmos(
        latent_channels=4, encoder_block_out_channels=(8,) * 4, decode_block_out_channels=(8,) * 4, num_layers=1,
        attention_resolutions=(), spatial_compression_ratio=8, temporal_compression_ratio=4, resolution=64,
    )  # fmt: skip


class Unchecked:
    """Replaces the safety checker of a package that is not installed: everything is safe."""

    def to(self, *args: Any) -> "Unchecked":
        return self

    def check_text_safety(self, prompt: str) -> bool:
        return True

    def check_video_safety(self, video: np.ndarray) -> np.ndarray:
        return video


def unipc() -> Parts:
    return {"scheduler": diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)}


ROUNDED = 3e-5  # for errors of rounding only, which are 0 in float64

WHOLE = {
    "wan": Whole("WanPipeline", "wan", coded("AutoencoderKLWan"), text=EMBEDS, parts=unipc, call=FRAMES),
    "wan_two": Whole(
        "WanPipeline",
        "wan",
        coded("AutoencoderKLWan"),
        text=EMBEDS,
        call=FRAMES,
        parts=lambda: {"transformer_2": transformer("wan", num_layers=2), "boundary_ratio": 0.7},
        dtype=torch.float64,
    ),
    "wan_two_i2v": Whole(
        "WanImageToVideoPipeline",
        "wan",
        coded("AutoencoderKLWan"),
        config={"in_channels": 12},
        text=EMBEDS,
        call=lambda: FRAMES() | {"image": picture()},
        parts=lambda: {"transformer_2": transformer("wan", in_channels=12, num_layers=2), "boundary_ratio": 0.7},
        dtype=torch.float64,
    ),
    "wan_i2v": Whole(
        "WanImageToVideoPipeline",
        "wan",
        coded("AutoencoderKLWan"),
        config={"in_channels": 12, "image_dim": 10, "added_kv_proj_dim": WIDTH},
        text=EMBEDS,
        parts=clip_vision,
        call=lambda: FRAMES() | {"image": picture()},
        dtype=torch.float64,
    ),
    "wan_ti2v": Whole(
        "WanImageToVideoPipeline",
        "wan",
        coded("AutoencoderKLWan"),
        text=EMBEDS,
        parts=lambda: {"expand_timesteps": True},
        dtype=torch.float64,
        call=lambda: FRAMES() | {"image": picture()},
    ),
    "wan_vace": Whole(
        "WanVACEPipeline",
        "wan_vace",
        coded("AutoencoderKLWan"),
        text=EMBEDS,
        config={"vace_in_channels": 2 * 4 + 64},
        call=lambda: FRAMES() | {"video": [picture()] * 9, "mask": [Image.new("L", (48, 80), 255)] * 9},
        tolerance=ROUNDED,
    ),
    "cogvideox": Whole(
        "CogVideoXPipeline",
        "cogvideox",
        coded("AutoencoderKLCogVideoX"),
        config={"attention_head_dim": 16},
        parts=lambda: t5() | {"scheduler": diffusers.CogVideoXDDIMScheduler()},
        call=lambda: FRAMES() | {"max_sequence_length": WORDS},
    ),
    "cogvideox_i2v": Whole(
        "CogVideoXImageToVideoPipeline",
        "cogvideox",
        coded("AutoencoderKLCogVideoX"),
        config={"attention_head_dim": 16, "in_channels": 8},
        parts=lambda: t5() | {"scheduler": diffusers.CogVideoXDPMScheduler()},
        call=lambda: FRAMES() | {"max_sequence_length": WORDS, "image": picture()},
        dtype=torch.float64,
    ),
    "hunyuan_video": Whole(
        "HunyuanVideoPipeline",
        "hunyuan_video",
        coded("AutoencoderKLHunyuanVideo"),
        config={"image_condition_type": None},
        text=MASKED | {"pooled_prompt_embeds": (10,)},
        call=lambda: FRAMES() | {"true_cfg_scale": 2.0},
    ),
    "ltx": Whole("LTXPipeline", "ltx", LTX_VAE, parts=t5, call=lambda: FRAMES() | LTX_CALL),
    "ltx_i2v": Whole(
        "LTXImageToVideoPipeline",
        "ltx",
        LTX_VAE,
        parts=t5,
        call=lambda: FRAMES() | LTX_CALL | {"image": picture(160, 96), "num_frames": 17},
    ),
    "ltx_condition": Whole(
        "LTXConditionPipeline",
        "ltx",
        LTX_VAE,
        parts=t5,
        call=lambda: FRAMES() | LTX_CALL | {"image": picture(160, 96), "num_frames": 17, "frame_index": 8},
    ),
    "qwen_image": Whole(
        "QwenImagePipeline", "qwen_image", QWEN_VAE, text=EMBEDS | {"prompt_embeds_mask": (WORDS,)}, parts=shifting
    ),
    "qwen_image_edit": Whole(
        "QwenImageEditPipeline",
        "qwen_image",
        QWEN_VAE,
        text=EMBEDS | {"prompt_embeds_mask": (WORDS,)},
        parts=shifting,
        call=lambda: {"image": picture()},
        within=small_pictures("QwenImageEditPipeline"),
    ),
    "flux_kontext": Whole(
        "FluxKontextPipeline",
        "flux",
        kl(2),
        parts=flux_text,
        call=lambda: {
            "image": picture(),
            "max_sequence_length": WORDS,
            "_auto_resize": False,
            "true_cfg_scale": 2.0,
            "max_area": 80 * 48,
        },
    ),
    "flux_fill": Whole(
        "FluxFillPipeline",
        "flux",
        kl(2),
        config={"in_channels": 272, "out_channels": 8},
        parts=flux_text,
        negative=False,
        call=lambda: {"image": picture(), "mask_image": Image.new("L", (48, 80), 255), "max_sequence_length": WORDS},
    ),
    "flux_control": Whole(
        "FluxControlPipeline",
        "flux",
        kl(2),
        config={"in_channels": 16, "out_channels": 8},
        parts=flux_text,
        negative=False,
        call=lambda: {"control_image": picture(), "max_sequence_length": WORDS},
    ),
    "flux2": Whole(
        "Flux2Pipeline",
        "flux2",
        coded("AutoencoderKLFlux2", latent_channels=2),
        text=EMBEDS,
        negative=False,
        parts=shifting,
        call=lambda: {"image": picture(80, 112)},
    ),
    "flux2_klein": Whole(
        "Flux2KleinPipeline",
        "flux2",
        coded("AutoencoderKLFlux2", latent_channels=2),
        config={"guidance_embeds": False},
        text=EMBEDS,
        parts=shifting,
    ),
    "z_image": Whole(
        "ZImagePipeline",
        "z_image",
        kl(4),
        config={"axes_lens": [128, 32, 32]},
        call=lambda: {"prompt_embeds": [rows(WORDS)], "negative_prompt_embeds": [rows(5)]},
    ),
    "sana": Whole(
        "SanaPipeline",
        "sana",
        DC,
        text=MASKED,
        parts=lambda: {
            "scheduler": DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        },
        call=lambda: {"negative_prompt": None, "use_resolution_binning": False, **LARGE},
    ),
    "sana_sprint": Whole(
        "SanaSprintPipeline",
        "sana",
        DC,
        text=MASKED,
        negative=False,
        config={"guidance_embeds": True},
        parts=lambda: {"scheduler": diffusers.SCMScheduler()},
        call=lambda: {"num_inference_steps": 2, "use_resolution_binning": False, **LARGE},
    ),
    "lumina2": Whole("Lumina2Pipeline", "lumina2", kl(4), text=MASKED),
    "cogview4": Whole("CogView4Pipeline", "cogview4", kl(4), text=EMBEDS),
    "chroma": Whole("ChromaPipeline", "chroma", kl(2), parts=t5, call=lambda: {"max_sequence_length": WORDS}),
    "aura_flow": Whole("AuraFlowPipeline", "auraflow", kl(4), text=MASKED),
    "mochi": Whole(
        "MochiPipeline",
        "mochi",
        coded("AutoencoderKLMochi", latent_channels=12),
        config={"in_channels": 12},
        parts=lambda: t5() | {"scheduler": FlowMatchEulerDiscreteScheduler(invert_sigmas=True)},
        call=lambda: {"num_frames": 13, "max_sequence_length": WORDS},
    ),
    "allegro": Whole(
        "AllegroPipeline",
        "allegro",
        allegro_vae,
        parts=lambda: t5() | {"scheduler": diffusers.EulerAncestralDiscreteScheduler()},
        call=lambda: {"output_type": "latent", "num_frames": 12, "max_sequence_length": WORDS, "clean_caption": False},
    ),
    "latte": Whole(
        "LattePipeline",
        "latte",
        kl(4),
        dtype=torch.float64,
        config={"out_channels": 8},
        parts=lambda: t5(120) | {"scheduler": DDIMScheduler()},
        call=lambda: {"video_length": 3, "clean_caption": False},
    ),
    "skyreels_v2": Whole(
        "SkyReelsV2Pipeline",
        "skyreels_v2",
        coded("AutoencoderKLWan"),
        config=ONE_FRAME_BLOCKS,
        text=EMBEDS,
        parts=unipc,
        call=FRAMES,
    ),
    "skyreels_v2_forcing": Whole(
        "SkyReelsV2DiffusionForcingPipeline",
        "skyreels_v2",
        coded("AutoencoderKLWan"),
        config=ONE_FRAME_BLOCKS,
        text=EMBEDS,
        parts=unipc,
        call=lambda: FRAMES() | {"ar_step": 1, "causal_block_size": 1, "prompt": None},
    ),
    "kandinsky5": Whole(
        "Kandinsky5T2VPipeline",
        "kandinsky5",
        coded("AutoencoderKLHunyuanVideo"),
        text={"prompt_embeds_qwen": (WORDS, TEXT), "prompt_embeds_clip": (10,)},
        call=lambda: (
            FRAMES()
            | {"prompt_cu_seqlens": torch.tensor([0, WORDS]), "negative_prompt_cu_seqlens": torch.tensor([0, WORDS])}
        ),
        tolerance=1e-4,
    ),
    "hidream": Whole(
        "HiDreamImagePipeline",
        "hidream",
        kl(4),
        config={"max_resolution": (128, 128)},
        text={"prompt_embeds_t5": (4, TEXT), "pooled_prompt_embeds": (10,)},
        call=lambda: {
            f"{sign}prompt_embeds_llama3": torch.stack([rows(WORDS + i)[None, i:] for i in (0, 1)])
            for sign in ("", "negative_")
        },
    ),
    "hunyuan_image": Whole("HunyuanImagePipeline", "hunyuan_image", hunyuan_image_vae, text=TWO_TEXTS),
    "krea2": Whole(
        "Krea2Pipeline",
        "krea2",
        QWEN_VAE,
        text={"prompt_embeds": (WORDS, 2, TEXT)},
        parts=shifting,
        call=lambda: {
            f"{sign}prompt_embeds_mask": torch.arange(WORDS)[None] < count
            for sign, count in (("", 5), ("negative_", 6))
        },
    ),
    "cosmos": Whole(
        "CosmosTextToWorldPipeline",
        "cosmos",
        cosmos_vae,
        text=EMBEDS,
        unsaved=lambda: {"safety_checker": Unchecked()},
        call=lambda: FRAMES() | {"output_type": "latent"},
        parts=lambda: {"scheduler": diffusers.EDMEulerScheduler()},
    ),
    "cosmos2": Whole(
        "Cosmos2TextToImagePipeline",
        "cosmos",
        coded("AutoencoderKLWan"),
        text=EMBEDS,
        parts=karras,
        unsaved=lambda: {"safety_checker": Unchecked()},
        call=lambda: {"guidance_scale": 2.0, "output_type": "latent"},
    ),
    "hunyuan_video_15": Whole(
        "HunyuanVideo15Pipeline",
        "hunyuan_video_15",
        hunyuan_video_15_vae,
        config={"in_channels": 9, "target_size": 64},
        text=TWO_TEXTS,
        parts=lambda: {"guider": diffusers.ClassifierFreeGuidance(guidance_scale=2.0)},
        call=lambda: {"num_frames": 9},
    ),
    "ltx2": Whole(
        "LTX2Pipeline",
        "ltx2",
        ltx2_vae,
        text=MASKED,
        parts=ltx2_sound,
        call=lambda: FRAMES() | LARGE | {"output_type": "latent", "spatio_temporal_guidance_blocks": [1]},
    ),
    "hunyuan_image_guided": Whole(
        "HunyuanImagePipeline",
        "hunyuan_image",
        hunyuan_image_vae,
        text=TWO_TEXTS,
        parts=lambda: {"guider": diffusers.AdaptiveProjectedMixGuidance(guidance_scale=2.0)},
    ),
} | NEWER
