"""What caches left out during a call."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any, NamedTuple

from torch import nn

from xfuser.call import CallState
from xfuser.core.hooks import innermost, replaced

ENTERED = ""  # the name of the first module's forward with its hooks, which runs in every forward


class CachedForward(NamedTuple):
    """One forward of a transformer on this rank: its step, its patch, its index within them, and what was left out.

    ``skipped`` are names of blocks, or of the modules within blocks where a cache works on these.
    """

    step: int
    patch: int
    index: int
    skipped: tuple[str, ...]


class CacheUse:
    """Counts the computations of one call that caches could leave out, and those that they did.

    Attributes:
        forwards: those that this rank computed, in their order.
        computed, skipped: numbers of blocks, or of modules within blocks where a cache works on these.
    """

    def __init__(self) -> None:
        self.forwards: list[CachedForward] = []
        self.computed = self.skipped = 0

    @contextmanager
    def counting(self, modules: dict[str, nn.Module]) -> Iterator[Callable[[CallState], None]]:
        """Within the context, runs of these modules are counted; gives what is to be called behind each forward."""
        ran: set[str] = set()
        with ExitStack() as stack:
            for name, module in modules.items():
                stack.enter_context(_noted(*innermost(module), ran, name))
            stack.enter_context(_noted(next(iter(modules.values())), "forward", ran, ENTERED))

            def end(call: CallState) -> None:
                if ENTERED in ran:
                    skipped = tuple(name for name in modules if name not in ran)
                    self.forwards.append(CachedForward(call.step, call.patch, call.index, skipped))
                    self.skipped += len(skipped)
                    self.computed += len(modules) - len(skipped)
                ran.clear()

            yield end


def _noted(owner: Any, attribute: str, ran: set[str], name: str) -> AbstractContextManager[None]:
    """Within the context, a forward adds a name to those that ran."""
    original = getattr(owner, attribute)

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        ran.add(name)
        return original(*args, **kwargs)

    return replaced(owner, attribute, forward)
