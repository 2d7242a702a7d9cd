"""Descriptions of tiny whole pipelines, and functions that build their components."""

import importlib
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any
from unittest import mock

import diffusers
import numpy as np
import running
import tiny
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from PIL import Image
from transformers import CLIPImageProcessor, CLIPVisionConfig, CLIPVisionModel

from xfuser.testing.zoo import FAMILIES, TEXT, WORDS

Parts = dict[str, Any]


@dataclass(frozen=True)
class Whole:
    """One pipeline.

    Attributes:
        cls: its class.
        family: family of its transformer in the zoo; ``config`` has changes of its configuration.
        vae: builds the VAE.
        parts: builds the other components; components without an entry are None.
        call: arguments of the call besides the usual ones.
        text: names of text embeddings (or masks, if the shape is one number) and their shapes without the batch;
            each has a negative counterpart if ``negative``.
        dtype: float64 if the pipeline amplifies rounding.
        unsaved: builds components that are not saved with the pipeline.
        tolerance: relative error that rounding explains.
        within: the context of a call.
        sized: whether the call takes a height and a width.
        prompted: whether the call takes a prompt, if there is no ``text``.
    """

    cls: str
    family: str
    vae: Callable[[], Any]
    config: Parts = field(default_factory=dict)
    parts: Callable[[], Parts] = dict
    call: Callable[[], Parts] = dict
    text: dict[str, tuple[int, ...]] = field(default_factory=dict)
    negative: bool = True
    tolerance: float = running.TOLERANCE
    dtype: torch.dtype = torch.float32
    unsaved: Callable[[], Parts] = dict
    within: Callable[[], AbstractContextManager[Any]] = nullcontext
    sized: bool = True
    prompted: bool = True


def transformer(family: str, **config: Any) -> Any:
    known = FAMILIES[family]
    return type(known)(**vars(known) | {"config": known.config | config}).build()


def picture(height: int = 80, width: int = 48) -> Image.Image:
    pixels = np.random.default_rng(3).integers(0, 255, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)


def small_pictures(cls: str) -> Callable[[], AbstractContextManager[Any]]:
    """Make a pipeline class resize its input image to a hundredth of a megapixel, instead of one megapixel."""

    def patched() -> AbstractContextManager[Any]:
        module = importlib.import_module(getattr(diffusers, cls).__module__)
        given = module.calculate_dimensions
        return mock.patch.object(module, "calculate_dimensions", lambda area, ratio: given(area // 100, ratio))

    return patched


def kl(channels: int) -> Callable[[], Any]:
    return partial(tiny.vae, channels)


def coded(name: str, **changes: Any) -> Callable[[], Any]:
    return partial(tiny.coder, name, **changes)


def t5(length: int = WORDS) -> Parts:
    return {"text_encoder": tiny.t5(), "tokenizer": tiny.tokenizer(length)}


def flux_text() -> Parts:
    first = {"text_encoder": tiny.clip(False), "tokenizer": tiny.tokenizer(5)}
    return first | {"text_encoder_2": tiny.t5(), "tokenizer_2": tiny.tokenizer(6)}


def clip_vision() -> Parts:
    config = CLIPVisionConfig(
        hidden_size=10, intermediate_size=16, num_hidden_layers=2, num_attention_heads=2, image_size=16, patch_size=8
    )
    sizes = {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}}
    return {"image_encoder": CLIPVisionModel(config), "image_processor": CLIPImageProcessor(**sizes)}


def rows(words: int) -> torch.Tensor:
    return torch.randn(words, TEXT, generator=torch.Generator().manual_seed(words))


def shifting() -> Parts:
    return {"scheduler": FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)}


QWEN_VAE = coded("AutoencoderKLQwenImage", z_dim=2, latents_mean=[0.0] * 2, latents_std=[1.0] * 2)
LARGE = {"height": 160, "width": 96}
EMBEDS = {"prompt_embeds": (WORDS, TEXT)}
MASKED = EMBEDS | {"prompt_attention_mask": (WORDS,)}
FRAMES: Callable[[], Parts] = lambda: {"num_frames": 9, "guidance_scale": 2.0}  # noqa: E731
