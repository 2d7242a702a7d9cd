"""Models that ``torch.compile`` was called with: wrapped, they run as they are written."""

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from xfuser.core.hooks import replaced
from xfuser.core.logger import logger
from xfuser.models.registry import original_of


@contextmanager
def uncompiled(pipe: Any, names: Iterable[str]) -> Iterator[None]:
    """Within the context, these components of a pipeline, and all modules in them, are what was compiled.

    Compiled code would run past the hooks of the methods: it is of the time when there were none. What
    ``torch.compile(module)`` returned stands aside, and calls the module if somebody still calls it; what
    ``module.compile()`` left on a module does, too. Afterwards all is compiled as before, except what has been replaced
    meanwhile.
    """
    with ExitStack() as stack:
        found = [_taken_out(stack, pipe, name) for name in names]
        if compiled := [type(model).__name__ for model, count in found if count]:
            logger.info(
                "%s is compiled: the wrapped pipeline runs it uncompiled; after unwrap() it is compiled again.",
                " and ".join(compiled),
            )
        yield


def _taken_out(stack: ExitStack, pipe: Any, name: str) -> tuple[nn.Module, int]:
    """The original of a component, and how many compiled modules were taken out of it."""
    given = getattr(pipe, name)
    count = _aside(stack, vars(pipe), name, given)
    for module in list(original_of(given).modules()):
        if vars(module).get("_compiled_call_impl"):
            stack.enter_context(replaced(module, "_compiled_call_impl", None))
            count += 1
        for key, child in module._modules.items():
            if child is not None:
                count += _aside(stack, module._modules, key, child)
    return original_of(given), count


def _aside(stack: ExitStack, places: dict[str, Any], key: str, compiled: nn.Module) -> bool:
    """Put the original of a compiled module in its place, until the stack closes."""
    original = original_of(compiled)
    if original is compiled:
        return False

    def put_back() -> None:
        if places.get(key) is original:
            places[key] = compiled

    places[key] = original
    stack.callback(put_back)
    stack.enter_context(replaced(compiled, "forward", original.__call__))
    return True
