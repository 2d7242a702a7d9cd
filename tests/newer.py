"""Tiny whole pipelines of the newest classes, and of some that are rarely used."""

import importlib
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import diffusers
import tiny
import torch
from diffusers import DPMSolverMultistepScheduler, FlowMatchEulerDiscreteScheduler
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
    kl,
    picture,
    rows,
    shifting,
    small_pictures,
    t5,
    transformer,
)  # fmt: skip
from transformers import Qwen3VLConfig, Qwen3VLModel

from xfuser.testing.zoo import TEXT, WIDTH, WORDS

OF_PICTURE = {"in_channels": 12, "image_dim": 10, "added_kv_proj_dim": WIDTH}
QWEN_TEXT = EMBEDS | {"prompt_embeds_mask": (WORDS,)}


class Vision:
    """Replaces the image processor of a text encoder that gets no images."""

    class image_processor:
        merge_size = 1

        def __new__(cls, images: Any, return_tensors: str) -> Parts:
            return {"pixel_values": torch.zeros(3, 8), "image_grid_thw": torch.tensor([[1, 1, 3]])}


class Chat:
    """Replaces the processor of a text encoder that is omitted."""

    class tokenizer:
        @staticmethod
        def encode(text: str) -> list[int]:
            return [0]

    def apply_chat_template(self, messages: list[Parts], **how: bool) -> list[list[int]]:
        return [[0, 1]]


def measured() -> diffusers.AutoencoderKL:
    vae = tiny.vae(4)
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0] * 4)
    return vae


def siglip() -> Parts:
    made = clip_vision()
    return {"image_encoder": made["image_encoder"], "feature_extractor": made["image_processor"]}


def sound_text() -> Parts:
    projection = diffusers.pipelines.stable_audio.StableAudioProjectionModel(TEXT, TEXT, 0, 8)
    return {
        "text_encoder": tiny.t5(), "tokenizer": tiny.tokenizer(WORDS), "projection_model": projection,
        "scheduler": diffusers.EDMDPMSolverMultistepScheduler(),
    }  # fmt: skip


def oobleck() -> diffusers.AutoencoderOobleck:
    return diffusers.AutoencoderOobleck(
        encoder_hidden_size=4, downsampling_ratios=[2, 2], channel_multiples=[1, 1], decoder_channels=4,
        decoder_input_channels=4, audio_channels=2, sampling_rate=20,
    )  # fmt: skip


def small_bucket() -> AbstractContextManager[Any]:
    """Make JoyImage use a small size, and seed torch: it encodes its input image without the call's generator."""
    torch.manual_seed(0)
    module = importlib.import_module("diffusers.pipelines.joyimage.image_processor")
    return mock.patch.object(module, "find_best_bucket", lambda *sizes: (80, 48))


def ace_step() -> Parts:
    from diffusers.pipelines.ace_step import AceStepConditionEncoder  # missing in older releases

    condition = AceStepConditionEncoder(
        hidden_size=TEXT, intermediate_size=16, text_hidden_dim=TEXT, timbre_hidden_dim=4, head_dim=8,
        num_lyric_encoder_hidden_layers=1, num_timbre_encoder_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, sliding_window=4,
    )  # fmt: skip
    scheduler = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1, shift=1.0)
    return t5() | {"condition_encoder": condition, "scheduler": scheduler}


def same() -> Any:
    return diffusers.AutoencoderSAME(
        patch_size=2, encoder_channels=8, encoder_c_mults=[2], encoder_strides=[2], encoder_transformer_depths=[1],
        latent_dim=4, dim_heads=8, sampling_rate=20,
    )  # fmt: skip


def pingpong() -> Parts:
    from diffusers.pipelines.stable_audio_3 import StableAudio3DurationEmbedder

    scheduler = FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    duration = StableAudio3DurationEmbedder(output_dim=TEXT, fourier_dim=8)
    return t5() | {"duration_embedder": duration, "scheduler": scheduler}


def longcat_vae() -> Any:
    return diffusers.LongCatAudioDiTVae(
        channels=8, c_mults=[1, 1], strides=[2, 2], latent_dim=4, encoder_latent_dim=8, downsampling_ratio=4,
        sample_rate=20,
    )  # fmt: skip


def mm_audio() -> Parts:
    vae = diffusers.MMAudioVAE(
        mel_bins=8, latent_channels=6, hidden_channels=8, channel_multipliers=(1, 1, 1), layers_per_block=1,
        sample_rate=200, n_fft=16, hop_length=8,
    )  # fmt: skip
    vocoder = diffusers.MMAudioVocoder(
        num_mels=8, upsample_initial_channel=8, upsample_rates=(4, 2), upsample_kernel_sizes=(8, 4),
        resblock_kernel_sizes=(3,), resblock_dilation_sizes=((1, 3, 5),),
    )  # fmt: skip
    return {"audio_vae": vae, "vocoder": vocoder}


def chat_encoder() -> Parts:
    """Return a Qwen3-VL of two layers, whose features have half the width that Ideogram's transformer takes."""
    text = {
        "hidden_size": TEXT // 2, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 16, "vocab_size": len(tiny.WORDS),
        "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [4, 2, 2]},
    }  # fmt: skip
    vision = {
        "depth": 1, "hidden_size": 8, "intermediate_size": 8, "num_heads": 1, "out_hidden_size": TEXT // 2,
        "num_position_embeddings": 4, "deepstack_visual_indexes": [],
    }  # fmt: skip
    tokenizer = tiny.tokenizer(WORDS)
    tokenizer.chat_template = "{{ messages[0]['content'][0]['text'] }}"
    config = Qwen3VLConfig(text_config=text, vision_config=vision)
    return {"text_encoder": Qwen3VLModel(config), "tokenizer": tokenizer}


def upscaling_vae() -> Any:
    return diffusers.Kandinsky6SRVAE(
        latent_channels=4, encoder_block_out_channels=(8,) * 5, decoder_block_out_channels=(8,) * 5, layers_per_block=1
    )


def two_layers() -> AbstractContextManager[Any]:
    module = importlib.import_module(diffusers.Ideogram4Pipeline.__module__)
    return mock.patch.object(module, "QWEN3_VL_ACTIVATION_LAYERS", (0, 1))


NEWER = {
    "anyflow": Whole(
        "AnyFlowPipeline", "anyflow", coded("AutoencoderKLWan"), text=EMBEDS, call=FRAMES,
        parts=lambda: {"scheduler": diffusers.FlowMapEulerDiscreteScheduler()},
    ),
    "bria": Whole("BriaPipeline", "bria", kl(2), text=EMBEDS),
    "chronoedit": Whole(
        "ChronoEditPipeline", "chronoedit", coded("AutoencoderKLWan"), config=OF_PICTURE, text=EMBEDS,
        parts=clip_vision, call=lambda: FRAMES() | {"image": picture()}, dtype=torch.float64,
    ),
    "easyanimate": Whole(
        "EasyAnimatePipeline", "easyanimate", coded("AutoencoderKLMagvit"), text=MASKED, call=FRAMES
    ),
    "ernie_image": Whole(
        "ErnieImagePipeline", "ernie_image", coded("AutoencoderKLFlux2", latent_channels=1),
        call=lambda: {
            "prompt": None, "negative_prompt": None, "use_pe": False, "prompt_embeds": [rows(WORDS)],
            "negative_prompt_embeds": [rows(5)],
        },
    ),
    "framepack": Whole(
        "HunyuanVideoFramepackPipeline", "framepack", coded("AutoencoderKLHunyuanVideo"), parts=siglip,
        text=MASKED | {"pooled_prompt_embeds": (10,)},
        call=lambda: {"image": picture(), "num_frames": 9, "latent_window_size": 2, "true_cfg_scale": 2.0},
    ),
    "motif_video": Whole(
        "MotifVideoPipeline", "motif_video", coded("AutoencoderKLWan"), config={"in_channels": 9}, text=MASKED,
        parts=lambda: {"guider": diffusers.ClassifierFreeGuidance(guidance_scale=2.0)},
        call=lambda: {"num_frames": 9}, tolerance=3e-5,
    ),
    "ovis_image": Whole(
        "OvisImagePipeline", "ovis_image", kl(2), text=EMBEDS, parts=shifting, call=lambda: {"negative_prompt": None}
    ),
    "prx": Whole("PRXPipeline", "prx", kl(4), text=MASKED, call=lambda: {"use_resolution_binning": False}),
    "qwen_image21": Whole(
        "QwenImage21Pipeline", "qwen_image21", coded("AutoencoderKLQwenImage21"), text=QWEN_TEXT, parts=shifting,
        config={"in_channels": 4, "out_channels": 4}, unsaved=lambda: {"processor": Chat()},
        call=lambda: {"true_cfg_scale": 2.0, "use_kv_cache": False},
    ),
    "sana_video": Whole(
        "SanaVideoPipeline", "sana_video", coded("AutoencoderKLWan"), text=MASKED,
        parts=lambda: {
            "scheduler": DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
        },
        call=lambda: LARGE | {"negative_prompt": None, "use_resolution_binning": False, "frames": 9},
    ),
    "nucleus_moe": Whole(
        "NucleusMoEImagePipeline", "nucleus_moe", QWEN_VAE, config={"patch_size": 2, "out_channels": 2},
        text=QWEN_TEXT, parts=shifting,
    ),
    "cogview3": Whole(
        "CogView3PlusPipeline", "cogview3", kl(4), text=EMBEDS,
        parts=lambda: {"scheduler": diffusers.CogVideoXDDIMScheduler()},
    ),
    "lumina": Whole("LuminaPipeline", "lumina_next", kl(4), config={"learn_sigma": True}, text=MASKED),
    "wan_animate": Whole(
        "WanAnimatePipeline", "wan_animate", coded("AutoencoderKLWan"), text=EMBEDS, parts=clip_vision,
        config=OF_PICTURE | {"out_channels": 4}, dtype=torch.float64,
        call=lambda: {
            "image": picture(), "pose_video": [picture()] * 9, "face_video": [picture()] * 9,
            "segment_frame_length": 9, "guidance_scale": 2.0,
        },
    ),
    "glm_image": Whole(
        "GlmImagePipeline", "glm_image", measured, text=EMBEDS,
        call=lambda: LARGE | {"prior_token_ids": torch.arange(60)[None] % 16},
    ),
    "helios": Whole(
        "HeliosPipeline", "helios", coded("AutoencoderKLWan"), text=EMBEDS, dtype=torch.float64,
        call=lambda: FRAMES() | {"history_sizes": [4, 2, 1], "num_latent_frames_per_chunk": 3},
    ),
    "stable_audio": Whole(
        "StableAudioPipeline", "stable_audio", oobleck, parts=sound_text, sized=False,
        config={"sample_size": 23, "global_states_input_dim": 2 * TEXT},
        call=lambda: {"audio_end_in_s": 4.0},
    ),
    "joyimage_edit": Whole(
        "JoyImageEditPipeline", "joyimage_edit", coded("AutoencoderKLWan"), text=QWEN_TEXT, within=small_bucket,
        call=lambda: {"image": picture()}, dtype=torch.float64,
    ),
    "ace_step": Whole(
        "AceStepPipeline", "ace_step", oobleck, parts=ace_step, config={"in_channels": 12}, sized=False,
        negative=False, call=lambda: {"lyrics": "the cat", "audio_duration": 4.6},
    ),
    "stable_audio3": Whole(
        "StableAudio3Pipeline", "stable_audio3", same, parts=pingpong, sized=False,
        config={"global_cond_dim": TEXT, "local_add_cond_dim": 0},
        call=lambda: {"duration": 4.6, "guidance_scale": 3.0},
    ),
    "longcat_audio": Whole(
        "LongCatAudioDiTPipeline", "longcat_audio", longcat_vae, sized=False,
        parts=lambda: t5() | {"scheduler": FlowMatchEulerDiscreteScheduler(shift=1.0, invert_sigmas=True)},
        call=lambda: {"audio_duration_s": 4.6},
    ),
    "longcat_image": Whole(
        "LongCatImagePipeline", "longcat_image", kl(16), config={"in_channels": 64}, parts=lambda: t5() | shifting(),
        call=lambda: {"enable_prompt_rewrite": False},
    ),
    "longcat_image_edit": Whole(
        "LongCatImageEditPipeline", "longcat_image", kl(16), config={"in_channels": 64}, sized=False,
        parts=lambda: t5() | shifting(), unsaved=lambda: {"text_processor": Vision()},
        within=small_pictures("LongCatImageEditPipeline"), call=lambda: {"image": picture()},
    ),
    "bria_fibo": Whole(
        "BriaFiboPipeline", "bria_fibo", coded("AutoencoderKLWan"), parts=lambda: t5() | shifting(),
        config={"in_channels": 4, "joint_attention_dim": 2 * TEXT, "text_encoder_dim": TEXT},
    ),
    "bria_fibo2": Whole(
        "BriaFibo2Pipeline", "bria_fibo2", coded("AutoencoderKLFlux2"), parts=shifting,
        text={"prompt_embeds": (2, WORDS, TEXT)},
        call=lambda: {
            f"{sign}prompt_embeds_mask": torch.arange(WORDS)[None] < count
            for sign, count in (("", 5), ("negative_", 6))
        },
    ),
    "ideogram4": Whole(
        "Ideogram4Pipeline", "ideogram4", coded("AutoencoderKLFlux2", latent_channels=2), negative=False,
        parts=lambda: chat_encoder() | {"unconditional_transformer": transformer("ideogram4", num_layers=2)},
        within=two_layers,
        call=lambda: {"guidance_scale": 2.0, "guidance_schedule": None, "max_sequence_length": 9},
    ),
    "kandinsky6": Whole(
        "Kandinsky6TI2VAPipeline", "kandinsky6", coded("AutoencoderKLHunyuanVideo"), parts=mm_audio,
        text=EMBEDS | {"pooled_prompt_embeds": (10,)}, call=FRAMES,
    ),
    "kandinsky6_i2v": Whole(
        "Kandinsky6TI2VAPipeline", "kandinsky6", coded("AutoencoderKLHunyuanVideo"), parts=mm_audio,
        text=EMBEDS | {"pooled_prompt_embeds": (10,)},
        config={"visual_cond": True, "visual_token_type_num_embeddings": 2},
        call=lambda: FRAMES() | {"image": picture()},
    ),
    "kandinsky6_sr": Whole(
        "Kandinsky6SRPipeline", "kandinsky6_sr", upscaling_vae, sized=False, prompted=False,
        config={"tile_sizes": ((128, 128),), "out_visual_dim": 4},
        call=lambda: {"video": [picture(80, 80)], "resolution_scale": 2, "tiles_batch_size": 3},
    ),
}  # fmt: skip
