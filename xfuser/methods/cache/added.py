"""Caches that a call adds to its transformers: those that flags request, and First-Block-Cache over several stages."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

from diffusers.hooks import FirstBlockCacheConfig, apply_first_block_cache
from diffusers.hooks._helpers import TransformerBlockRegistry
from torch import nn

from xfuser.call import CallState
from xfuser.config import EngineConfig
from xfuser.methods.cache import hooks
from xfuser.methods.cache.hooks import Cached
from xfuser.methods.cache.means import SharedMeans
from xfuser.methods.cache.rules import FirstBlock, TeaCache
from xfuser.methods.cache.stack import BlockStack, Rule
from xfuser.methods.pipefusion.blocks import Stub
from xfuser.models.plan import ModelPlan, blocks_of
from xfuser.models.registry import planned_models
from xfuser.models.teacache import TEACACHE, TeaCachePlan, teacache_plan

THRESHOLD = 0.1  # default of use_fbcache: skips a third of the blocks (docs/methods/caching.md)


class AddedCache:
    """The cache that is added to one transformer when a call begins, and removed when it ends."""

    def __init__(self, pipe: Any, model: nn.Module, plan: ModelPlan, engine_config: EngineConfig) -> None:
        self._pipe, self._model, self._plan = pipe, model, plan
        self._runtime, self._parallel = engine_config.runtime_config, engine_config.parallel_config

    def enter(self, call: CallState) -> None:
        """During the call, the cache's hooks are registered. Must be called before anything hooks into blocks."""
        there = hooks.cached(self._model)
        if there and self._runtime.caches:
            raise ValueError(
                f"use_fbcache, use_teacache: {type(self._model).__name__} has another cache"
                f" ({type(there[0].hook).__name__}): call disable_cache() on it, or remove the flag"
            )
        # First-Block-Cache of Diffusers cannot span stages: FirstBlock takes its place for this call.
        for one in _of_first_block(there) if self._parallel.pipelined else ():
            call.callback(one.module._diffusers_hook.register_hook, one.hook, hooks.remove(one))
        given = self._runtime.cache_threshold
        means = SharedMeans(call)
        if self._runtime.use_teacache:
            plan = _teacache_of(self._model)
            must_run = partial(_must_run, self._pipe, call, plan.first)
            self._stack(TeaCache(plan, plan.threshold if given is None else given, means, must_run), call)
        elif self._parallel.pipelined and (self._runtime.use_fbcache or _of_first_block(there)):
            enabled = (one.hook.threshold for one in there if hasattr(one.hook, "threshold"))
            self._stack(FirstBlock(next(enabled, THRESHOLD if given is None else given), means), call)
        elif self._runtime.use_fbcache:
            call.enter_context(first_block_cache(self._model, given))

    def _stack(self, rule: Rule, call: CallState) -> None:
        blocks = blocks_of(self._model, self._plan)
        own = [block for block in blocks if not isinstance(block.module, Stub)]
        BlockStack(self._plan, own, rule if own[0] is blocks[0] else None, call).hook()


@contextmanager
def first_block_cache(model: nn.Module, threshold: float | None = None) -> Iterator[None]:
    """Within the context, a transformer has Diffusers' First-Block-Cache, by default with :data:`THRESHOLD`."""
    apply_first_block_cache(model, FirstBlockCacheConfig(THRESHOLD if threshold is None else threshold))
    hooks.refresh(model)
    try:
        yield
    finally:
        for one in _of_first_block(hooks.cached(model)):
            hooks.remove(one)
        hooks.refresh(model)


def cache_as(cls: type, known: type) -> None:
    """Let Diffusers' caches treat blocks of ``cls`` like blocks of ``known``, if they support that class."""
    try:
        metadata = TransformerBlockRegistry.get(known)
    except ValueError:
        return
    TransformerBlockRegistry.register(cls, replace(metadata))


def check_cache(pipe: Any, engine_config: EngineConfig) -> None:
    """Raise a ValueError if the cache that flags request does not support a pipeline's transformers."""
    runtime, models = engine_config.runtime_config, planned_models(pipe)
    for model, plan in models.values():
        if runtime.use_teacache:
            found = _teacache_of(model)
            if len(models) > 1:
                raise ValueError(
                    f"use_teacache: the coefficients of {found.model} are not known to work for two transformers"
                    " that divide the steps: use use_fbcache"
                )
            if found.threshold is None and runtime.cache_threshold is None:
                raise ValueError(f"use_teacache: no threshold is published for {found.model}: set cache_threshold")
        elif runtime.use_fbcache:
            _check_blocks(model, plan)


def _teacache_of(model: nn.Module) -> TeaCachePlan:
    """The TeaCache plan of a model's class or of the nearest base class, as FSDP makes a class for its copy."""
    names = [cls.__name__ for cls in type(model).__mro__]
    return teacache_plan(next((name for name in names if name in TEACACHE), names[0]), model.config)


def _check_blocks(model: nn.Module, plan: ModelPlan) -> None:
    blocks = blocks_of(model, plan)
    carried = [plan.carriers(block.list_name) for block in blocks]
    served = len(blocks) > 1 and all(carriers == carried[0] and "hidden_states" in carriers for carriers in carried)
    if not served or not all(_is_known(block.module) for block in blocks):
        raise ValueError(
            f"use_fbcache: Diffusers' First-Block-Cache does not support {type(model).__name__}: remove it"
        )


def _is_known(block: nn.Module) -> bool:
    """Whether First-Block-Cache supports a block; SD3's last block does not return the text that the cache requires."""
    try:
        TransformerBlockRegistry.get(type(block))
    except ValueError:
        return False
    return not getattr(block, "context_pre_only", False)


def _of_first_block(there: list[Cached]) -> list[Cached]:
    return [one for one in there if one.kind == hooks.FIRST_BLOCK]


def _must_run(pipe: Any, call: CallState, first: int) -> bool:
    """Whether the current step is among the ``first`` steps of its schedule, or the last one."""
    steps = call.steps or getattr(pipe, "_num_timesteps", 0) or len(getattr(pipe.scheduler, "timesteps", ()))
    return not first <= call.step < steps - 1
