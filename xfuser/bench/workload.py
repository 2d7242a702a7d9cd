"""The workload: a pipeline, the arguments of its call, and the ways to call it."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import diffusers
import numpy as np
import torch
import torch.distributed as dist

from xfuser.bench.cases import CASES, seeded
from xfuser.bench.configurations import Configuration
from xfuser.config import EngineConfig, InputConfig, ParallelConfig, xFuserArgs
from xfuser.core import device as devices
from xfuser.core.distributed import get_world_group
from xfuser.methods.cache import hooks
from xfuser.methods.cache.added import first_block_cache
from xfuser.models.registry import planned_models
from xfuser.parallel import xDiTParallel
from xfuser.pipeline_io.arguments import pipeline_arguments
from xfuser.pipeline_io.media import media_of
from xfuser.testing.ranks import own_parallelism_runs_here
from xfuser.weights.loading import load_pipeline

LOADING = ("dtype", "use_fp8_t5_encoder")  # runtime options that affect loading, besides enable_...


class Workload:
    """A pipeline to measure, ``args.model`` or a named case; ``sizes`` override the case's arguments."""

    def __init__(self, args: xFuserArgs, case: str | None = None, sizes: dict[str, int] | None = None) -> None:
        self._engine, self._inputs = args.checked()
        self._case = CASES[case] if case else None
        self._sizes = sizes or {}
        self._loaded: dict[tuple, Any] = {}
        self._calls: dict[str | None, dict[str, Any]] = {}

    def pipe(self, engine: EngineConfig | None = None) -> Any:
        """The bare pipeline, loaded once per set of loading options; by default, with those of the serial run."""
        engine = engine or self._engine
        runtime = vars(engine.runtime_config)
        key = tuple((name, runtime[name]) for name in sorted(runtime) if name in LOADING or name.startswith("enable_"))
        if key not in self._loaded:
            self._loaded[key] = self.load(engine)
        return self._loaded[key]

    def load(self, engine: EngineConfig | None = None) -> Any:
        """Load a new pipeline."""
        engine = engine or self._engine
        if self._case:
            pipe = seeded(self._case.pipeline).to(devices.device(get_world_group().local_rank))
        else:
            pipe = load_pipeline(_whole(engine), self._inputs)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    @contextmanager
    def serial(self) -> Iterator[Any]:
        """Context with the bare pipeline, with First-Block-Cache if requested outside of the configurations."""
        pipe, runtime = self.pipe(), self._engine.runtime_config
        with ExitStack() as stack:
            for model, _ in planned_models(pipe).values() if runtime.use_fbcache else ():
                stack.enter_context(first_block_cache(model, runtime.cache_threshold))
                stack.enter_context(hooks.in_context(hooks.managers(hooks.cached(model)), "serial"))
            yield pipe

    def call(self, prompt: str | None = None) -> dict[str, Any]:
        """The arguments of the call; ``prompt`` replaces the requested prompts."""
        if prompt not in self._calls:
            self._calls[prompt] = self._case_call() if self._case else self._model_call(prompt)
        return self._calls[prompt]

    def _case_call(self) -> dict[str, Any]:
        device = devices.device(get_world_group().local_rank)
        call = self._case.call() | self._sizes
        return {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in call.items()}

    def _model_call(self, prompt: str | None) -> dict[str, Any]:
        inputs = replace(self._inputs, prompt=prompt) if prompt else self._inputs
        call = pipeline_arguments(self.pipe(), inputs)
        return call | ({"output_type": "pt"} if inputs.output_type == "pil" and "output_type" in call else {})

    def run(self, pipe: Any, prompt: str | None = None, place: int = 0, **changes: Any) -> torch.Tensor:
        """Call the pipeline; returns the images, ``[N, ...]``, in 0..1 unless they are latents.

        The noise depends on the seed, and on the ``place`` among several prompts.
        """
        call = self.call(prompt) | {"generator": torch.Generator().manual_seed(self._inputs.seed + place)}
        with torch.no_grad():
            media = media_of(pipe(**call | changes))
        return torch.stack([torch.as_tensor(np.asarray(one) if isinstance(one, list) else one) for one in media])


def _whole(engine: EngineConfig) -> EngineConfig:
    """A configuration that loads all weights on every rank, for the serial run; wrapping divides them."""
    replicas = ParallelConfig(dp_degree=get_world_group().world_size)
    runtime = replace(engine.runtime_config, text_encoder="replicate")
    return replace(engine, parallel_config=replicas, runtime_config=runtime)


@dataclass(frozen=True)
class Contender:
    """A way to call the workload's pipeline; ``opened`` creates a context that yields the pipeline to call."""

    name: str
    opened: Callable[[], AbstractContextManager[Any]]


def ours(workload: Workload, configuration: Configuration) -> Contender:
    """The contender that wraps a workload's pipeline with a configuration of this library."""
    return Contender(configuration.name, lambda: wrapped(workload.pipe(configuration.engine), configuration.engine))


@contextmanager
def wrapped(bare: Any, engine: EngineConfig) -> Iterator[Any]:
    """Context with the wrapped pipeline."""
    pipe = xDiTParallel(bare, engine, InputConfig())
    yield pipe
    pipe.unwrap()  # not after an error, as all ranks must take part


def diffusers_own(workload: Workload, ranks: int) -> Contender:
    """The contender of Diffusers' own Ulysses (its ring has no CPU kernel), on a separate pipeline."""
    held: list[Any] = []

    @contextmanager
    def opened() -> Iterator[Any]:
        if not held:
            held.append(workload.load())
            with own_parallelism_runs_here():
                config = diffusers.ContextParallelConfig(ulysses_degree=ranks)
                held[0].transformer.enable_parallelism(config=config)
        yield held[0]

    return Contender(f"diffusers ulysses_degree={ranks}", opened)


def check_peer() -> None:
    """Raise a ValueError if the installed release of Diffusers has no context parallelism."""
    if not hasattr(diffusers, "ContextParallelConfig"):
        raise ValueError(f"against diffusers: release {diffusers.__version__} has no ContextParallelConfig")


def timed(action: Callable[[], Any]) -> tuple[float, float]:
    """Run ``action``; returns the times at which all ranks started it and had finished it, in seconds of the clock."""
    dist.barrier()
    devices.synchronize()
    start = time.perf_counter()
    action()
    devices.synchronize()
    dist.barrier()
    return start, time.perf_counter()
