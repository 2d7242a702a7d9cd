"""Counts of what caches skipped during a call."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any, NamedTuple

from torch import nn

from xfuser.call import CallState
from xfuser.core.hooks import innermost, replaced

ENTERED = ""  # name of the first module's forward including its hooks, which runs in every forward


class CachedForward(NamedTuple):
    """One forward of a transformer on this rank: its step, patch, index within the sub-step, and what was skipped.

    ``skipped`` are names of blocks, or of modules within blocks if a cache works on these.
    """

    step: int
    patch: int
    index: int
    skipped: tuple[str, ...]


class CacheUse:
    """Counts the computations of one call that caches ran and skipped.

    Attributes:
        forwards: the forwards that this rank computed, in order.
        computed, skipped: numbers of blocks, or of modules within blocks if a cache works on these.
    """

    def __init__(self) -> None:
        self.forwards: list[CachedForward] = []
        self.computed = self.skipped = 0

    def count(self, call: CallState, modules: dict[str, nn.Module]) -> Callable[[], None]:
        """Count the runs of these modules during a call; returns a function that must be called after each forward."""
        ran: set[str] = set()
        for name, module in modules.items():
            call.enter_context(_noted(*innermost(module), ran, name))
        call.enter_context(_noted(next(iter(modules.values())), "forward", ran, ENTERED))

        def end() -> None:
            if ENTERED in ran:
                skipped = tuple(name for name in modules if name not in ran)
                self.forwards.append(CachedForward(call.step, call.patch, call.index, skipped))
                self.skipped += len(skipped)
                self.computed += len(modules) - len(skipped)
            ran.clear()

        return end


def _noted(owner: Any, attribute: str, ran: set[str], name: str) -> AbstractContextManager[None]:
    """Within the context, each forward adds ``name`` to ``ran``."""
    original = getattr(owner, attribute)

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        ran.add(name)
        return original(*args, **kwargs)

    return replaced(owner, attribute, forward)
