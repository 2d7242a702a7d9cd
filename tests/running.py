"""What the ranks of the parity tests do: load a pipeline, call it wrapped or bare."""

from functools import cache
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from xfuser import xDiTParallel, xFuserArgs

TOLERANCE = 1e-5


@cache
def loaded(path: str) -> Any:
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def configured(path: str, scheduler: Any = None) -> Any:
    pipe = loaded(path)
    original = pipe.scheduler
    if scheduler:
        pipe.scheduler = scheduler.from_config(original.config)
    return pipe, original


def bare(path: str, call: dict[str, Any], scheduler: Any = None) -> np.ndarray:
    """The reference: the pipeline as it is, in this process."""
    pipe, original = configured(path, scheduler)
    try:
        return np.asarray(pipe(**call, generator=torch.Generator().manual_seed(5))[0])
    finally:
        pipe.scheduler = original


def wrapped(path: str, degrees: dict[str, Any], call: dict[str, Any], scheduler: Any = None) -> np.ndarray:
    """The same call on this rank of a wrapped pipeline."""
    pipe, original = configured(path, scheduler)
    try:
        engine_config, input_config = xFuserArgs(**degrees).create_config()
        parallel = xDiTParallel(pipe, engine_config, input_config)
        return np.asarray(parallel(**call, generator=torch.Generator().manual_seed(5))[0])
    finally:
        pipe.scheduler = original


def error(a: np.ndarray, b: np.ndarray) -> float:
    """max|a - b| / max|b|."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float(np.abs(np.asarray(a, np.float64) - b).max() / np.abs(b).max())
