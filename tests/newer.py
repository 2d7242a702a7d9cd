"""Tiny whole pipelines of the classes that came last, and of some that are seldom used."""

import importlib
from contextlib import AbstractContextManager
from typing import Any
from unittest import mock

import diffusers
import tiny
import torch
from diffusers import DPMSolverMultistepScheduler
from parts import EMBEDS, FRAMES, LARGE, MASKED, QWEN_VAE, Parts, Whole, clip_vision, coded, kl, picture, rows, shifting

from xfuser.testing.zoo import TEXT, WIDTH, WORDS

OF_PICTURE = {"in_channels": 12, "image_dim": 10, "added_kv_proj_dim": WIDTH}
QWEN_TEXT = EMBEDS | {"prompt_embeds_mask": (WORDS,)}


class Chat:
    """Stands in for the processor of a text encoder that is left out."""

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
    """JoyImage gives its picture one of its sizes, and draws that one's latents without the call's generator."""
    torch.manual_seed(0)
    module = importlib.import_module("diffusers.pipelines.joyimage.image_processor")
    return mock.patch.object(module, "find_best_bucket", lambda *sizes: (80, 48))


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
}  # fmt: skip
