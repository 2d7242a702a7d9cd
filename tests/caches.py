"""Functions that the ranks of the caching tests run: call with a cache, and record which modules ran in which step."""

import functools
import inspect
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import diffusers
import torch
from diffusers import hooks
from diffusers.hooks.hooks import StateManager

from xfuser import xDiTParallel, xFuserArgs
from xfuser.core.distributed import get_cfg_group
from xfuser.testing import cache_oracle, oracle, zoo
from xfuser.testing.loop import loop_of

_video = zoo.FAMILIES["hunyuan_video"]
TEXT_TO_VIDEO = {"hunyuan_video t2v": replace(_video, config=_video.config | {"image_condition_type": None})}
_wan = zoo.FAMILIES["wan"]
_sizes = {"num_attention_heads": 12, "num_layers": 30, "attention_head_dim": 8, "in_channels": 16, "out_channels": 16}
WAN = {"wan 1.3B": replace(_wan, config=_wan.config | _sizes, latents=(16, *_wan.latents[1:]))}
FAMILIES = zoo.FAMILIES | TEXT_TO_VIDEO | WAN


def family_of(name: str) -> zoo.Family:
    """Return a family by its name; the size of its latents may follow: ``"wan 10x6"``."""
    if name in FAMILIES:
        return FAMILIES[name]
    name, size = name.split()
    latents = (*FAMILIES[name].latents[:-2], *map(int, size.split("x")))
    return replace(FAMILIES[name], latents=latents)


APPLY = {
    "FirstBlockCacheConfig": "apply_first_block_cache",
    "MagCacheConfig": "apply_mag_cache",
    "TaylorSeerCacheConfig": "apply_taylorseer_cache",
    "PyramidAttentionBroadcastConfig": "apply_pyramid_attention_broadcast",
    "FasterCacheConfig": "apply_faster_cache",
}
TIMED = ("PyramidAttentionBroadcastConfig", "FasterCacheConfig")


def enable(pipe: Any, kind: str, options: dict[str, Any]) -> None:
    """Like ``enable_cache``, but also for classes without it."""
    if kind in TIMED:
        options = options | {"current_timestep_callback": lambda: 500}
    getattr(hooks, APPLY[kind])(pipe.transformer, getattr(diffusers, kind)(**options))


class Recorder:
    """Records the modules with hooks that ran in each forward, ``(step, names)``, and the ratios behind decisions."""

    def __init__(self, pipe: Any) -> None:
        self.forwards: list[tuple[int, set[str]]] = []
        self.ratios: list[float] = []
        self.step, self.call = 0, 0
        model, self._pipe = pipe.transformer, pipe
        for name, module in model.named_modules():
            registry = vars(module).get("_diffusers_hook")
            if module is not model and registry and registry.hooks:
                reference = registry._fn_refs[0]
                reference.original_forward = self._noted(reference.original_forward, name)
                for hook in registry.hooks.values():
                    if hasattr(hook, "_should_compute_remaining_blocks"):
                        self._watch(hook)
        model.forward = self._begun(model.forward)

    def _noted(self, original: Any, name: str) -> Any:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.forwards[-1][1].add(name)
            return original(*args, **kwargs)

        return forward

    def _begun(self, original: Any) -> Any:
        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.forwards.append((self.step, set()))
            return original(*args, **kwargs)

        forward.__signature__ = inspect.signature(original)
        return forward

    def _watch(self, hook: Any) -> None:
        original = hook._should_compute_remaining_blocks

        def decide(residual: torch.Tensor) -> bool:
            before = hook.state_manager.get_state().head_block_residual
            if before is not None:
                self.ratios.append(((residual - before).abs().mean() / before.abs().mean()).item())
            return original(residual)

        hook._should_compute_remaining_blocks = decide

    @contextmanager
    def counting(self) -> Any:
        """Within the context, steps are counted."""
        scheduler, original = self._pipe.scheduler, self._pipe.scheduler.step

        @functools.wraps(original)
        def step(*args: Any, **kwargs: Any) -> Any:
            self.step += 1
            return original(*args, **kwargs)

        scheduler.step, self.step = step, 0
        yield
        del scheduler.step


@contextmanager
def contexts(pipe: Any, recorder: Recorder) -> Any:
    """Within the context, an unwrapped pipeline gives each call of a step its own cache context, as most do."""
    model, seen = pipe.transformer, [-1, 0]
    original = model.forward
    modules = [module for module in model.modules() if vars(module).get("_diffusers_hook")]
    hooks = [hook for module in modules for hook in module._diffusers_hook.hooks.values()]
    managers = [value for hook in hooks for value in vars(hook).values() if isinstance(value, StateManager)]

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        seen[:] = [recorder.step, seen[1] + 1 if seen[0] == recorder.step else 0]
        for manager in managers:
            manager.set_context(diffusers.hooks.hooks.CacheContext(str(seen[1])))
        return original(*args, **kwargs)

    model.forward = forward
    yield
    model.forward = original


def draw(
    family: str,
    degrees: dict[str, Any] | None,
    call: dict[str, Any],
    kind: str,
    options: dict[str, Any],
    behind_wrap: bool = False,
) -> Any:
    """Return latents, the forwards that ran, and the ratios of the decisions; unwrapped if ``degrees`` is None.

    A wrapped pipeline returns its CFG rank instead of the ratios.
    """
    pipe = loop_of(family_of(family))
    parallel = xDiTParallel(pipe, *xFuserArgs(**degrees).create_config()) if behind_wrap and degrees else None
    enable(pipe, kind, options)
    recorder = Recorder(pipe)
    if degrees is None:
        with recorder.counting(), contexts(pipe, recorder):
            return pipe(family_of(family), **call), recorder.forwards, recorder.ratios
    parallel = parallel or xDiTParallel(pipe, *xFuserArgs(**degrees).create_config())
    with recorder.counting():
        latents = parallel(family_of(family), **call)
    return latents, recorder.forwards, get_cfg_group().rank_in_group


def expected_forwards(forwards: list[Any], degrees: dict[str, Any], call: dict[str, Any], branch: int) -> list[Any]:
    """Return the forwards of a rank: after the first step, only its branch if guidance makes two calls."""
    paired = degrees.get("use_cfg_parallel") and call["guidance"] == "sequential" and call["images"] == 1
    if not paired:
        return forwards
    return [one for i, one in enumerate(forwards) if one[0] == 0 or i % 2 == branch]


def draw_flagged(family: str, flags: dict[str, Any], call: dict[str, Any]) -> Any:
    """Call a wrapped pipeline twice; return the latents, and whether blocks were skipped by step, call and patch."""
    pipe = loop_of(family_of(family))
    parallel = xDiTParallel(pipe, *xFuserArgs(**flags).create_config())
    results = []
    for _ in range(2):
        latents = parallel(family_of(family), **call)
        forwards = parallel.cache_use.forwards
        results.append((latents, {(one.step, one.index, one.patch): bool(one.skipped) for one in forwards}))
    return results


def oracle_of(family: str, call: dict[str, Any], patches: int, warmup: int, *rule: Any) -> Any:
    """Return the oracle's latents, and whether it skipped blocks by step, call and patch."""
    pipe, cache = loop_of(family_of(family)), cache_oracle.Cache(*rule)
    with oracle.displaced(pipe, patches, warmup, cache):
        return pipe(family_of(family), **call), cache.skipped


def joint_oracle_of(family: str, call: dict[str, Any], parts: int, warmup: int, *rule: Any) -> Any:
    """The same under DistriFusion."""
    pipe, cache = loop_of(family_of(family)), cache_oracle.JointCache(*rule)
    with oracle.distrifusion(pipe, parts, warmup, cache=cache):
        return pipe(family_of(family), **call), cache.skipped
