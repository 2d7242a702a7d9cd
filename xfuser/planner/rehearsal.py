"""Rehearse a pipeline's call without weights and without other ranks, to count its memory and its work.

The pipeline, its scheduler, its tokenizers, and the engine are real. Weights and activations have shapes but no values
(``FakeTensorMode``). The ``fake`` backend of torch.distributed, which sends nothing, stands in for the other ranks.
"""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from diffusers.utils.logging import disable_progress_bar
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from xfuser.config import EngineConfig, InputConfig
from xfuser.core import device as devices
from xfuser.core.distributed import destroy_distributed_environment
from xfuser.core.hooks import replaced
from xfuser.core.logger import quiet_libraries
from xfuser.core.meters import LiveMemory
from xfuser.methods.pipefusion.blocks import block_cost, owners_of
from xfuser.models.plan import blocks_of
from xfuser.models.registry import plan_of, planned_models
from xfuser.parallel import xDiTParallel
from xfuser.planner.published import call_of, check_guidance, module_of, named, parts_of, pipeline_of, texts_of
from xfuser.planner.repeats import Seen, repeats
from xfuser.planner.trace import Event, Mark, Tracer
from xfuser.weights.fsdp import outermost_lists
from xfuser.weights.placement import pipeline_split
from xfuser.weights.skeleton import Folder, component, components_of

STEP = "step"
CODER = ("encode", "decode")  # VAE methods that pipelines call


@dataclass
class Rehearsed:
    """What a call requires on the rank with the most weights: bytes, and the events of :mod:`xfuser.planner.trace`.

    Attributes:
        weights: bytes by component.
        transformers: names of the components that parallelism divides.
        units: by component, bytes of each module whose shards are gathered together.
        live: by component, peak bytes of tensors other than weights while it computes, including those that any
            component keeps for later, such as PipeFusion's keys and values.
        kept: bytes of such tensors between the transformers' forwards, and after them.
        steps: events of each sub-step, by step and patch.
        parts: events of the other components' calls, by component.
        stages: computation of each PipeFusion stage relative to the first, for the most unevenly divided transformer.
        forwards: transformer forwards per step.
    """

    weights: dict[str, int] = field(default_factory=dict)
    transformers: set[str] = field(default_factory=set)
    units: dict[str, list[int]] = field(default_factory=dict)
    live: dict[str, int] = field(default_factory=dict)
    kept: int = 0
    steps: dict[tuple[int, int], list[Event]] = field(default_factory=dict)
    parts: dict[str, list[Event]] = field(default_factory=dict)
    stages: list[float] = field(default_factory=lambda: [1.0])
    forwards: int = 1


@contextmanager
def alone_of(world_size: int) -> Iterator[None]:
    """Context in which this process is rank 0 of ``world_size``, on the CPU, without the other ranks."""
    hook = sys.excepthook  # torch prefixes errors with the rank, once more for each group
    dist.init_process_group("fake", rank=0, world_size=world_size, store=FakeStore())
    sys.excepthook = hook
    try:
        with devices.on_cpu():
            yield
    finally:
        destroy_distributed_environment()
        dist.destroy_process_group()


def rehearse(engine_config: EngineConfig, input_config: InputConfig, source: "Source | None" = None) -> Rehearsed:
    """Count what a call requires on a rank; must run within :func:`alone_of` the configuration's world size.

    Pass the same ``source`` to all rehearsals of a pipeline, so that they share common results.

    Raises:
        ValueError: the configuration does not fit the pipeline.
        RuntimeError: a forward reads the values of tensors, which do not exist.
    """
    runtime = engine_config.runtime_config
    source = source or Source(engine_config.model_config.model, runtime.dtype)
    if source.published:
        check_guidance(source.published, input_config)
    with torch.no_grad(), quiet_libraries():
        return _Rehearsal(source, engine_config, input_config).run()


class Source:
    """A pipeline's folder or published sizes, and the state that its rehearsals share."""

    def __init__(self, model: str, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.published = None if os.path.isdir(model) else named(model)
        self._folder = Folder(model, dtype, None, set())
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.known: dict[Any, Any] = {}  # calls of components that no configuration changes
        self._parts: dict[str, nn.Module] = {}

    def parts(self, fresh: bool) -> dict[str, nn.Module]:
        """The modules; ``fresh``: with new transformers, for a rehearsal that changes them."""
        if not self._parts:
            self._parts = self._built()
        if not fresh:
            return dict(self._parts)
        return {n: self._faked(self.module(n)) if plan_of(part) else part for n, part in self._parts.items()}

    def steps(self, stages: int, warmup: int, branches: int = 1) -> int:
        """How many steps to rehearse.

        Without stages, all steps are alike, except that with CFG parallelism the first one may run both branches on
        each rank. With stages, there are synchronous and stale steps; two transformers each have their own warm-up.
        """
        plans = [plan for part in self.parts(fresh=False).values() if (plan := plan_of(part))]
        least = max((plan.least_steps for plan in plans), default=1)
        return len(plans) * max(1, warmup) + 1 if stages > 1 else max(branches, least)

    def _built(self) -> dict[str, nn.Module]:
        if self.published:
            parts = parts_of(self.published, self.dtype)
        else:
            with self._folder.naming_damage():
                found = {name: component(self.model, name, self.dtype) for name in components_of(self.model)}
            parts = {name: part for name, part in found.items() if part}
        return {name: self._faked(part) for name, part in parts.items()}

    def module(self, name: str) -> nn.Module:
        """A new instance of one component, on the meta device."""
        if self.published:
            return module_of(self.published, name, self.dtype)
        return component(self.model, name, self.dtype)

    def _faked(self, part: nn.Module) -> nn.Module:
        _fake_parameters(part, self.fake)
        return part

    def call(self, pipe: Any, wrapped: Any, inputs: InputConfig) -> dict[str, Any]:
        """The arguments of the pipeline's call."""
        return call_of(self.published, pipe, inputs, self.dtype) if self.published else wrapped.call_arguments()

    def texts(self, inputs: InputConfig) -> list[tuple[str, Tensor]]:
        """Inputs of the text encoders that the pipeline does not call itself."""
        return texts_of(self.published, inputs) if self.published else []

    def pipeline(self, parts: dict[str, nn.Module]) -> Any:
        """Build the pipeline from these modules."""
        pipe = pipeline_of(self.published, parts) if self.published else self._loaded(parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def _loaded(self, parts: dict[str, nn.Module]) -> Any:
        disable_progress_bar()
        with self._folder.naming_damage():
            return DiffusionPipeline.from_pretrained(self.model, **parts)


class _Rehearsal:
    """One call under one configuration."""

    def __init__(self, source: Source, engine_config: EngineConfig, input_config: InputConfig) -> None:
        self._source, self._engine, self._inputs = source, engine_config, input_config
        self._meter, self._tracer = LiveMemory(), Tracer()
        self._forwards, self._place = 0, (0, False)
        self._last: dict[Any, dict[Any, Seen]] = {}  # blocks that ran, by component and step, separately for patch 0
        self.told = Rehearsed()

    def run(self) -> Rehearsed:
        told, source, parallel = self.told, self._source, self._engine.parallel_config
        parts = source.parts(fresh=parallel.divides)
        with ExitStack() as stack:
            told.live = dict.fromkeys(parts, 0)
            for name, part in parts.items():
                for method in CODER if hasattr(part, CODER[1]) else ("forward",):
                    stack.enter_context(replaced(part, method, self._simulated(name, part, method)))
            pipe = source.pipeline(parts)
            heaviest, told.stages = _stages(pipe, self._engine)
            told.transformers = set(planned_models(pipe))
            told.units = {name: units_of(part) for name, part in parts.items()}
            wrapped = xDiTParallel(pipe, self._engine, self._inputs)
            held = {name: getattr(wrapped, name, None) or part for name, part in parts.items()}
            told.weights = {name: int(weight_of(part) * heaviest.get(name, 1)) for name, part in held.items()}
            with self._meter, self._tracer.messages(), self._tracer:
                wrapped(**source.call(pipe, wrapped, self._inputs))
                for name, tokens in source.texts(self._inputs):
                    parts[name](tokens)
            wrapped.__dict__["_compiled"].close()
        self._sort()
        return told

    def _simulated(self, name: str, part: nn.Module, method: str) -> Callable[..., Any]:
        """Wrap a method: compute only shapes, accept and return real tensors, and record memory and events."""
        original, fake, told = getattr(part, method), self._source.fake, self.told
        given = _few_pixels if method == CODER[1] else _zeros

        def as_fake(x: Tensor) -> Tensor:
            return x if isinstance(x, FakeTensor) else fake.from_tensor(x)

        @wraps(original)
        def call(*args: Any, **kwargs: Any) -> Any:
            key = self._key(name, method, args, kwargs)
            told.kept = max(told.kept, self._meter.live * (self._forwards > 0))
            if key in self._source.known:
                live, events, output = self._source.known[key]
                told.live[name] = max(told.live[name], self._meter.live + live)
                self._tracer.trace.events += [Mark(name), *events]
                return tree_map_only(FakeTensor, given, output)
            self._begin(name, part)
            args, kwargs = tree_map_only(Tensor, as_fake, (args, kwargs))
            before, self._meter.peak = self._meter.peak, self._meter.live
            base, start = self._meter.live, len(self._tracer.trace.events)
            counting = (fake, self._meter, self._tracer.traffic, self._tracer, self._repeats(name, part))
            with _disable_current_modes(), ExitStack() as stack:
                for context in counting:
                    stack.enter_context(context)
                output = original(*args, **kwargs)
            told.live[name] = max(told.live[name], self._meter.peak)
            if key:
                self._source.known[key] = self._meter.peak - base, self._tracer.trace.events[start:], output
            self._meter.peak = max(before, self._meter.peak)
            return tree_map_only(FakeTensor, given, output)

        return call

    def _key(self, name: str, method: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """The key under which an undivided component's call is shared; None for divided components."""
        runtime = self._engine.runtime_config
        divided = (runtime.use_parallel_vae and method in CODER) or runtime.text_encoder != "replicate"
        if name in self.told.transformers or divided or self._engine.parallel_config.tensor_parallel_text_encoder:
            return None
        values = tree_leaves((args, kwargs))
        return name, method, tuple(tuple(x.shape) if isinstance(x, Tensor) else str(x)[:40] for x in values)

    def _begin(self, name: str, part: nn.Module) -> None:
        if name not in self.told.transformers:
            self._tracer.trace.events.append(Mark(name))
            return
        state = getattr(part.forward, "call_state", None)
        step, patch = (state.step, state.patch) if state else (-1 - self._forwards, 0)
        self._forwards, self._place = self._forwards + 1, (step, patch > 0)  # only patch 0 has the text
        self._tracer.trace.events.append(Mark(STEP, step, patch))

    def _repeats(self, name: str, part: nn.Module) -> AbstractContextManager[None]:
        plan = plan_of(part) if name in self.told.transformers else None
        last = self._last.setdefault((name, self._place), {}) if plan else {}
        return repeats(part, plan, self._tracer.trace, self._meter, last)

    def _sort(self) -> None:
        """Sort events by sub-step and component. Without a call state, a forward's number determines its step."""
        each = self.told.forwards = max(1, self._forwards // self._inputs.num_inference_steps)
        for mark, events in self._tracer.trace.parts().items():
            if mark.part == STEP:
                step = mark.step if mark.step >= 0 else (-1 - mark.step) // each
                self.told.steps.setdefault((step, mark.patch), []).extend(events)
            else:
                self.told.parts.setdefault(mark.part, []).extend(events)


def _zeros(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=x.dtype)


def _few_pixels(x: Tensor) -> Tensor:
    """Crop decoded images: only their conversion is left to do, which is slow for a video."""
    return _zeros(x[..., :8, :8] if x.dim() > 3 else x)


def weight_of(module: nn.Module) -> int:
    """Bytes of a module's parameters and buffers, except those on the meta device, which other ranks hold."""
    return sum(x.nbytes for x in (*module.parameters(), *module.buffers()) if x.device.type != "meta")


def units_of(module: nn.Module) -> list[int]:
    """Bytes of each block of a module."""
    plan = plan_of(module)
    blocks = [block.module for block in blocks_of(module, plan)] if plan else []
    return [sum(x.nbytes for x in one.parameters()) for one in blocks or outermost_lists(module)]


def _fake_parameters(module: nn.Module, fake: FakeTensorMode) -> None:
    """Replace a skeleton's parameters by fake ones on a device."""
    new: dict[nn.Parameter | None, nn.Parameter | None] = {None: None}
    for owner in module.modules():
        for key, old in owner._parameters.items():
            if old not in new:
                with fake:
                    new[old] = nn.Parameter(torch.empty(old.shape, dtype=old.dtype), requires_grad=False)
            owner._parameters[key] = new[old]


def _stages(pipe: Any, engine_config: EngineConfig) -> tuple[dict[str, float], list[float]]:
    """Weights and computation of PipeFusion's stages, relative to the first stage, which is the rehearsed one.

    Returns the weight of the heaviest stage of each transformer, and the computation of each stage of the most unevenly
    divided transformer.
    """
    models, factors, paces = planned_models(pipe), {}, [[1.0]]
    for name, layers in pipeline_split(models, type(pipe).__name__, engine_config.parallel_config).items():
        model, plan = models[name]
        lent = {weight for module in plan.lent for weight in model.get_submodule(module).parameters()}
        blocks = [set(block.module.parameters()) - lent for block in blocks_of(model, plan)]
        sizes = [sum(weight.nbytes for weight in weights) for weights in blocks]
        everywhere = sum(weight.nbytes for weight in model.parameters()) - sum(sizes)
        stages, paces_of = [everywhere] * len(layers), [0.0] * len(layers)
        for block, size, owner in zip(blocks_of(model, plan), sizes, owners_of(model, plan, layers), strict=True):
            stages[owner] += size
            paces_of[owner] += block_cost(block.module, plan)
        factors[name] = max(stages) / stages[0]
        paces.append([cost / paces_of[0] for cost in paces_of])
    return factors, max(paces, key=lambda pace: (len(pace), max(pace)))
