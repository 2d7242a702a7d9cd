"""Functions that the ranks of the tests run: load a pipeline, and call it wrapped, or unwrapped without degrees."""

import pickle
from collections.abc import Callable
from functools import cache, wraps
from typing import Any

import diffusers
import numpy as np
import pytest
import tiny
import torch
from diffusers import DiffusionPipeline

from xfuser import xDiTParallel, xFuserArgs
from xfuser.core.distributed import destroy_distributed_environment
from xfuser.weights.loading import DTYPE_ARGUMENT

TOLERANCE = 1e-5


def fresh(path: str, dtype: torch.dtype = torch.float32) -> Any:
    """A pipeline that a test may change, unlike the shared one of :func:`loaded`."""
    pipe = DiffusionPipeline.from_pretrained(path, **{DTYPE_ARGUMENT: dtype})
    pipe.set_progress_bar_config(disable=True)
    return pipe


@cache
def loaded(path: str, dtype: torch.dtype = torch.float32) -> Any:
    return fresh(path, dtype)


def drawn(pipe: Any, call: dict[str, Any]) -> np.ndarray:
    """The image of one call, always from the same noise."""
    return array(pipe(**call, generator=seeded()))


def wrap(pipe: Any, degrees: dict[str, Any] | None) -> Any:
    """Wrap the pipeline; return it unchanged if ``degrees`` is None."""
    return pipe if degrees is None else xDiTParallel(pipe, *xFuserArgs(**degrees).create_config())


def unwrap(pipe: Any) -> Any:
    return pipe.unwrap() if isinstance(pipe, xDiTParallel) else pipe


def leave() -> None:
    """Leave all process groups of this process."""
    destroy_distributed_environment()
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def array(result: Any) -> np.ndarray:
    return np.asarray(result[0])


def run(path: str, degrees: Any, calls: list[Any], scheduler: Any, dtype: torch.dtype) -> list[np.ndarray]:
    pipe = loaded(path, dtype)
    original = pipe.scheduler
    if scheduler:
        pipe.scheduler = scheduler.from_config(original.config)
    try:
        called = wrap(pipe, degrees)
        pictures = [array(called(**call, generator=seeded())) for call in calls]
        unwrap(called)
        return pictures
    finally:
        pipe.scheduler = original


def remembered(function: Callable[..., Any]) -> Callable[..., Any]:
    """Cache the results of ``function``: many tests need the same reference."""
    results: dict[bytes, Any] = {}

    @wraps(function)
    def recalled(*args: Any, **kwargs: Any) -> Any:
        key = pickle.dumps((args, kwargs))
        if key not in results:
            results[key] = function(*args, **kwargs)
        return results[key]

    return recalled


@remembered
def bare(path: str, call: dict[str, Any], scheduler: Any = None, dtype: torch.dtype = torch.float32) -> np.ndarray:
    """Return the reference: the unwrapped pipeline in this process."""
    return run(path, None, [call], scheduler, dtype)[0]


def wrapped(path: str, degrees: Any, call: Any, scheduler: Any = None, dtype: Any = torch.float32) -> np.ndarray:
    return run(path, degrees, [call], scheduler, dtype)[0]


def wrapped_calls(path: str, degrees: dict[str, Any], calls: list[dict[str, Any]]) -> list[np.ndarray]:
    return run(path, degrees, calls, None, torch.float32)


def error(a: np.ndarray, b: np.ndarray) -> float:
    """Return max|a - b| / max|b|."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max())


def picture(height: int = 80, width: int = 48) -> torch.Tensor:
    return torch.rand(1, 3, height, width, generator=seeded())


def image_to_image(path: str, degrees: Any) -> np.ndarray:
    """Run three prompts on one input image, from the middle of the schedule."""
    pipe = diffusers.AutoPipelineForImage2Image.from_pipe(loaded(path))
    call = tiny.call_of("sd3" if "sd3" in path else "flux", 3, num_inference_steps=4, strength=0.6, image=picture())
    return array(wrap(pipe, degrees)(**call, generator=seeded()))


def inpaint(path: str, degrees: Any) -> np.ndarray:
    pipe = diffusers.AutoPipelineForInpainting.from_pipe(loaded(path))
    mask = torch.zeros(1, 1, 80, 48)
    mask[..., :40, :] = 1
    call = tiny.call_of("sd3" if "sd3" in path else "flux", 2, num_inference_steps=4, strength=0.8)
    return array(wrap(pipe, degrees)(**call, image=picture(), mask_image=mask, generator=seeded()))


def controlnet(path: str, degrees: Any) -> np.ndarray:
    pipe = loaded.__wrapped__(path)  # from_transformer() changes the transformer's configuration
    torch.manual_seed(1)
    net = diffusers.SD3ControlNetModel.from_transformer(
        pipe.transformer, num_layers=2, num_extra_conditioning_channels=0
    )
    for block in net.controlnet_blocks:
        torch.nn.init.normal_(block.weight, std=0.3)
    parts = {name: part for name, part in pipe.components.items() if name not in ("image_encoder", "feature_extractor")}
    pipe = diffusers.StableDiffusion3ControlNetPipeline(**parts, controlnet=net)
    pipe.set_progress_bar_config(disable=True)
    call = tiny.call_of("sd3", 2, control_image=picture(), controlnet_conditioning_scale=0.7)
    return array(wrap(pipe, degrees)(**call, generator=seeded()))


def masked_forward(path: str, degrees: Any, hide: int = 4) -> np.ndarray:
    """Run one forward of the transformer that masks the last ``hide`` of 15 image tokens in self-attention."""
    pipe = loaded(path)
    latents = torch.randn(2, 4, 10, 6, generator=seeded())
    mask = torch.ones(2, 15)
    mask[:, 15 - hide :] = 0
    text = torch.randn(2, 5, tiny.TEXT, generator=seeded())
    conditions = {"resolution": None, "aspect_ratio": None}

    def forward() -> np.ndarray:
        timestep = torch.tensor([500, 500])
        with torch.no_grad():
            return pipe.transformer(
                latents, text, timestep, conditions, attention_mask=mask, return_dict=False
            )[0].numpy()  # fmt: skip

    if degrees is None:
        return forward()
    with wrap(pipe, degrees).active():
        return forward()


def fingerprint(pipe: Any) -> list[Any]:
    """Return everything that a wrap could change: hooks, instance attributes, weights."""
    parts = [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]
    modules = [module for part in parts for module in part.modules()]
    hooks = [(len(one._forward_hooks), len(one._forward_pre_hooks), sorted(vars(one))) for one in modules]
    state = [(name, weight.sum().item()) for part in parts for name, weight in part.state_dict().items()]
    return [hooks, state, sorted(vars(pipe)), sorted(vars(pipe.scheduler)), str(pipe.config)]


def unwraps_cleanly(path: str, call: dict[str, Any]) -> bool:
    """Wrap twice with different degrees, then unwrap: check that nothing changed and the result is the same."""
    pipe = loaded(path)
    before, expected = fingerprint(pipe), array(pipe(**call, generator=seeded()))
    before = fingerprint(pipe)
    for degrees in ({"ulysses_degree": 2}, {"use_cfg_parallel": True}):
        parallel = wrap(pipe, degrees)
        assert error(array(parallel(**call, generator=seeded())), expected) <= TOLERANCE
        assert parallel.unwrap() is pipe
        with pytest.raises(RuntimeError, match="unwrapped already"):
            parallel.unwrap()
    return before == fingerprint(pipe) and np.array_equal(array(pipe(**call, generator=seeded())), expected)


def unseeded(path: str, degrees: dict[str, Any], call: dict[str, Any]) -> np.ndarray:
    torch.manual_seed(torch.distributed.get_rank())
    return array(wrap(loaded(path), degrees)(**call))


def callback_latents(path: str, degrees: Any) -> list[np.ndarray]:
    seen = []

    def callback(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        seen.append(values["latents"].numpy().copy())
        return values

    call = tiny.call_of("sd3", 3, callback_on_step_end=callback)
    wrap(loaded(path), degrees)(**call, generator=seeded())
    return seen
