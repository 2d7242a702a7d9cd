"""A pipeline's call without its weights and without other ranks, to see what memory it takes.

The pipeline, its scheduler, its tokenizers and the engine are real. Weights and activations have shapes and no values
(``FakeTensorMode``); the other ranks are the ``fake`` backend of torch.distributed, which sends nothing.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar
from huggingface_hub import snapshot_download
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._pytree import tree_map_only

from xfuser.config import EngineConfig, InputConfig
from xfuser.core import device as devices
from xfuser.core.distributed import destroy_distributed_environment
from xfuser.core.logger import quiet_libraries
from xfuser.core.meters import LiveMemory
from xfuser.methods.pipefusion.blocks import divide
from xfuser.models.plan import blocks_of
from xfuser.models.registry import plan_of, planned_models
from xfuser.parallel import xDiTParallel
from xfuser.weights.fsdp import outermost_lists
from xfuser.weights.placement import pipeline_split
from xfuser.weights.skeleton import component, components_of

CODER = ("encode", "decode")  # the methods by which pipelines call their VAE


@dataclass
class Memory:
    """Bytes on the rank that has most weights.

    Attributes:
        weights: of each component of the pipeline.
        transformers: names of the components that parallelism divides.
        units: of each component, of the modules whose shards are gathered at a time.
        live: of tensors other than weights, at the peak while a component computes; with what any component keeps for
            later, such as the keys and values of PipeFusion.
        kept: of those between the transformers' forwards.
    """

    weights: dict[str, int] = field(default_factory=dict)
    transformers: set[str] = field(default_factory=set)
    units: dict[str, list[int]] = field(default_factory=dict)
    live: dict[str, int] = field(default_factory=dict)
    kept: int = 0


@contextmanager
def alone_of(world_size: int) -> Iterator[None]:
    """Within the context, this process is rank 0 of ``world_size``, on the CPU, and the others do not exist."""
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    try:
        with devices.on_cpu():
            yield
    finally:
        destroy_distributed_environment()
        dist.destroy_process_group()


def configs_of(model: str, cache: str | None = None) -> str:
    """The folder of a pipeline; of one on the hub, all but the weights is downloaded."""
    if os.path.isdir(model):
        return model
    return snapshot_download(model, cache_dir=cache, allow_patterns=["*.json", "*.txt", "*.model", "*.jinja"])


def rehearse(engine_config: EngineConfig, input_config: InputConfig) -> Memory:
    """What a call takes on a rank; within :func:`alone_of` the configuration's number of ranks.

    Raises:
        ValueError: the configuration does not fit the pipeline.
        RuntimeError: a forward reads the values of its tensors, which have none.
    """
    folder, dtype = engine_config.model_config.model, engine_config.runtime_config.dtype
    parts = {name: part for name in components_of(folder) if (part := component(folder, name, dtype))}
    fake, meter = FakeTensorMode(allow_non_fake_inputs=True), LiveMemory()
    memory = Memory(live=dict.fromkeys(parts, 0))
    for name, part in parts.items():
        _fake_parameters(part, fake)
        for method in CODER if hasattr(part, CODER[1]) else ("forward",):
            setattr(part, method, _simulated(getattr(part, method), name, fake, meter, memory))
    disable_progress_bar()
    with quiet_libraries():
        pipe = DiffusionPipeline.from_pretrained(folder, **parts)
    pipe.set_progress_bar_config(disable=True)
    heaviest = _heaviest_stage(pipe, engine_config)
    memory.transformers = set(planned_models(pipe))
    memory.units = {name: units_of(part) for name, part in parts.items()}
    parallel = xDiTParallel(pipe, engine_config, input_config)
    memory.weights = {name: int(weight_of(getattr(parallel, name)) * heaviest.get(name, 1)) for name in parts}
    with meter:
        parallel(**parallel.call_arguments())
    return memory


def weight_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, but for those on the meta device, which other ranks have."""
    return sum(x.nbytes for x in (*module.parameters(), *module.buffers()) if x.device.type != "meta")


def units_of(module: nn.Module) -> list[int]:
    """Bytes of the blocks of a module."""
    plan = plan_of(module)
    blocks = [block.module for block in blocks_of(module, plan)] if plan else []
    return [sum(x.nbytes for x in one.parameters()) for one in blocks or outermost_lists(module)]


def _fake_parameters(module: nn.Module, fake: FakeTensorMode) -> None:
    """Put fake parameters of a device in the place of a skeleton's."""
    new: dict[nn.Parameter | None, nn.Parameter | None] = {None: None}
    for owner in module.modules():
        for key, old in owner._parameters.items():
            if old not in new:
                with fake:
                    new[old] = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), requires_grad=False)
            owner._parameters[key] = new[old]


def _simulated(
    original: Callable[..., Any], name: str, fake: FakeTensorMode, meter: LiveMemory, memory: Memory
) -> Callable[..., Any]:
    """A method that computes shapes alone, takes and returns real tensors, and notes its memory."""

    def as_fake(x: Tensor) -> Tensor:
        return x if isinstance(x, FakeTensor) else fake.from_tensor(x)

    @wraps(original)
    def call(*args: Any, **kwargs: Any) -> Any:
        if memory.live[name] and name in memory.transformers:  # not its first call
            memory.kept = max(memory.kept, meter.live)
        args, kwargs = tree_map_only(Tensor, as_fake, (args, kwargs))
        before, meter.peak = meter.peak, meter.live
        with fake, meter:
            output = original(*args, **kwargs)
        memory.live[name] = max(memory.live[name], meter.peak)
        meter.peak = max(before, meter.peak)
        return tree_map_only(FakeTensor, lambda x: torch.zeros(x.shape, dtype=x.dtype), output)

    return call


def _heaviest_stage(pipe: Any, engine_config: EngineConfig) -> dict[str, float]:
    """Of each transformer, how much more the heaviest PipeFusion stage weighs than the first, which is rehearsed."""
    models, factors = planned_models(pipe), {}
    for name, layers in pipeline_split(models, type(pipe).__name__, engine_config.parallel_config).items():
        weights = []
        for stage in range(len(layers)):
            model = component(engine_config.model_config.model, name, engine_config.runtime_config.dtype)
            divide(model, models[name][1], layers, stage)
            weights.append(sum(x.nbytes for x in model.parameters()))
        factors[name] = max(weights) / weights[0]
    return factors
