"""Caches under every method: one decision for the ranks that share a forward, and separate state for each call."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

from torch import Tensor, nn

from xfuser.call import CallState, Forward
from xfuser.config import EngineConfig, ParallelConfig
from xfuser.core.hooks import Arguments, replaced
from xfuser.methods.cache import hooks
from xfuser.methods.cache.added import AddedCache
from xfuser.methods.cache.hooks import Cached
from xfuser.methods.cache.means import SharedMeans
from xfuser.methods.cache.use import CacheUse
from xfuser.models.plan import ModelPlan, Streams

RULE = "_should_compute_remaining_blocks"  # method of First-Block-Cache: decides by the first block's residual


def cache_methods(
    pipe: Any, models: Iterable[tuple[nn.Module, ModelPlan]], engine_config: EngineConfig, use: CacheUse
) -> tuple[list[AddedCache], list["Caching"]]:
    """Methods to enter before all that hooks into or compiles blocks, and those to enter before all that hooks in."""
    runtime, parallel = engine_config.runtime_config, engine_config.parallel_config
    models = [planned for planned in models if runtime.caches or hooks.cached(planned[0])]
    added = [AddedCache(pipe, *planned, engine_config) for planned in models]
    return added, [Caching(*planned, parallel, use) for planned in models]


class Caching:
    """The caches of one transformer during a call, enabled by flags or by the caller.

    Args:
        use: counts the computations.
    """

    def __init__(self, model: nn.Module, plan: ModelPlan, parallel: ParallelConfig, use: CacheUse) -> None:
        self._model, self._plan, self._parallel, self._use = model, plan, parallel, use
        self._arguments: Arguments = {}  # of the running forward, with the whole batch

    def enter(self, call: CallState) -> None:
        """During the call, caches decide alike on all ranks; they begin without state.

        Must be called before anything hooks into blocks, but after blocks are compiled.
        """
        found = hooks.cached(self._model)
        self._check(found)
        means = SharedMeans(call)
        call.at_schedule(partial(hooks.reset, found))
        hooks.reset(found)
        call.callback(hooks.reset, found)
        for context in self._decisions(found, means):
            call.enter_context(context)
        modules = {one.name: one.module for one in found if one.module is not self._model}
        call.around(self._model, partial(self._wrapper, found, call, self._use.count(call, modules)))

    def _wrapper(
        self, found: list[Cached], call: CallState, end: Callable[[], None], forward: Forward, given: Arguments
    ) -> Any:
        mixed = next((one.hook for one in found if one.kind in hooks.MIXED), None)
        if mixed and call.index and self._parallel.cfg_degree > 1:
            self._refuse(mixed, "keeps one state for all calls of a step, which CFG parallelism divides over ranks")
        self._arguments = given
        try:
            with hooks.in_context(hooks.managers(found), f"call {call.index}"):
                return forward(given)
        finally:
            end()
            self._arguments = {}

    def _decisions(self, found: list[Cached], means: SharedMeans) -> Iterator[AbstractContextManager[None]]:
        """Contexts that replace the decisions of caches that use activations."""
        for one in found:
            if hasattr(one.hook, RULE):
                streams = self._streams(one.name)
                yield replaced(one.hook, RULE, _shared(getattr(one.hook, RULE), means, streams))
            if getattr(one.hook, "raw_vision_callback", None):  # decides by the latents of the whole batch
                yield replaced(one.hook, "raw_vision_callback", partial(self._whole, one.hook.raw_vision_callback))

    def _whole(self, callback: Callable[..., Any], model: nn.Module, args: tuple, kwargs: Arguments) -> Any:
        return callback(model, (), self._arguments)

    def _streams(self, block: str) -> Streams:
        return self._plan.carriers(block.rpartition(".")[0]).get(self._plan.image, ("image",))

    def _check(self, found: list[Cached]) -> None:
        """Raise for caches that would compute something else than on one rank."""
        parallel, kinds = self._parallel, {one.kind: one.hook for one in found}
        splits_batch = parallel.cfg_degree * parallel.dp_degree > 1
        other = next((hook for kind, hook in kinds.items() if kind != hooks.STACK), None)
        if other and parallel.pipelined:
            self._refuse(other, "keeps what a whole image's tokens gave, but each forward has those of one patch")
        if hooks.FIRST_BLOCK in kinds and not any(hasattr(one.hook, RULE) for one in found):
            self._refuse(kinds[hooks.FIRST_BLOCK], f"does not decide by {RULE}() in this release of Diffusers")
        if parallel.sp_degree > 1 and self._plan.halvings:
            self._refuse(next(iter(kinds.values())), "is not known to be correct on the bands of a U-Net's maps")
        faster = kinds.get(hooks.FASTER)
        if faster and splits_batch and not faster.is_guidance_distilled:
            self._refuse(faster, "halves the batch of guidance, which CFG and data parallelism split")
        mag = kinds.get(hooks.MAG)
        if mag and mag.config.calibrate and parallel.world_size > 1:
            self._refuse(mag, "with calibrate=True measures each rank's own tokens")
        if hooks.SEA in kinds and parallel.fully_shard_degree > 1:
            self._refuse(kinds[hooks.SEA], "skips no block if weights are sharded")

    def _refuse(self, hook: Any, why: str) -> None:
        flags = self._parallel.degrees() | {"num_pipeline_patch": self._parallel.num_pipeline_patch}
        methods = ", ".join(flag for flag, degree in flags.items() if degree > 1)
        raise ValueError(
            f"{type(hook).__name__} of {type(self._model).__name__} {why}: call disable_cache() on it, and use another"
            f" cache, such as FirstBlockCacheConfig, or other methods than {methods}"
        )


def _shared(rule: Callable[[Tensor], bool], means: SharedMeans, streams: Streams) -> Callable[[Tensor], bool]:
    def decide(residual: Tensor) -> bool:
        return means.decide(partial(rule, residual), streams)

    return decide
