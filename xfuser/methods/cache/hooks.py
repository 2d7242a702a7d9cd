"""The hooks of caches on a model's modules, and their state."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

from diffusers.hooks import HookRegistry, hooks as registries
from torch import nn

FIRST_BLOCK, MAG, TAYLOR, PYRAMID, FASTER, SEA = (
    "first_block_cache", "mag_cache", "taylorseer_cache", "pyramid_attention_broadcast", "faster_cache", "sea_cache",
)  # fmt: skip
STACK = "stack"  # of this package
KNOWN = (FIRST_BLOCK, MAG, TAYLOR, PYRAMID, FASTER, SEA, STACK)
MIXED = (PYRAMID, FASTER)  # these keep one state for all calls of a step


class Cached(NamedTuple):
    """A module with a hook of a cache; ``kind`` is the name of the cache's file, in Diffusers or here."""

    name: str
    module: nn.Module
    hook: Any
    kind: str


def cached(model: nn.Module) -> list[Cached]:
    """The modules of a model that have hooks of caches.

    Raises:
        ValueError: an unknown hook keeps state between steps.
    """
    found = []
    for name, module in model.named_modules():
        registry = vars(module).get("_diffusers_hook")
        for hook in registry.hooks.values() if registry else ():
            kind = type(hook).__module__.rpartition(".")[2]
            if kind in KNOWN:
                found.append(Cached(name, module, hook, kind))
            elif hook._is_stateful:
                raise ValueError(
                    f"{type(hook).__name__} of {type(model).__name__} keeps a state between steps, of which nothing is"
                    f" known here: call disable_cache() on it first; known caches are {', '.join(KNOWN[:-1])}"
                )
    return found


def remove(one: Cached) -> str:
    """Remove a hook; return its name."""
    registry = one.module._diffusers_hook
    name = next(name for name, hook in registry.hooks.items() if hook is one.hook)
    registry.remove_hook(name, recurse=False)
    return name


def refresh(model: nn.Module) -> None:
    """Must be called after hooks were added or removed, so that contexts set by pipelines reach the current hooks."""
    HookRegistry.check_if_exists_or_initialize(model)._child_registries_cache = None


def reset(hooks: list[Cached]) -> None:
    """Reset the state of hooks."""
    for one in hooks:
        if one.hook._is_stateful:
            one.hook.reset_state(one.module)


def managers(hooks: list[Cached]) -> list[Any]:
    """The managers that keep the state of these hooks by context, each one once."""
    values = (value for one in hooks for value in vars(one.hook).values())
    return list({id(value): value for value in values if isinstance(value, registries.StateManager)}.values())


@contextmanager
def in_context(managers: list[Any], name: str) -> Iterator[None]:
    """Within the context, hooks use the state of this name, unless the pipeline has set a context."""
    of_release = getattr(registries, "CacheContext", str)  # older releases have only names
    lacking = [one for one in managers if not _context(one)]
    for manager in lacking:
        manager.set_context(of_release(name))
    try:
        yield
    finally:
        for manager in lacking:
            manager.set_context(None)


def _context(manager: Any) -> Any:
    return vars(manager).get("_context") or vars(manager).get("_current_context")
