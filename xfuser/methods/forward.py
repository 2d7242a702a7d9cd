"""Hooks by argument name: how a method takes part in the forward of an unmodified module."""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import MethodType
from typing import Any

from torch import nn

from xfuser.core.hooks import Arguments, Binder, replaced

Call = Callable[[Arguments], Any]
Layer = Callable[[Call, Arguments], Any]


def layered_forward(module: nn.Module, layers: list[Layer]) -> AbstractContextManager[None]:
    """Within the context, ``module``'s forward runs inside ``layers``, the first one outermost.

    A layer is called as ``layer(call, arguments)``, and calls ``call(arguments)`` to go on, or not.

    Raises:
        RuntimeError: the module's forward is layered already.
    """
    original = module.forward
    if hasattr(original, "layers"):
        raise RuntimeError(f"{type(module).__name__} runs in parallel already: active() and calls do not nest")
    bind = Binder(original)

    def innermost(arguments: Arguments) -> Any:
        return original(**arguments)

    call: Call = innermost
    for layer in reversed(layers):
        call = functools.partial(layer, call)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(bind(args, kwargs))

    forward.layers = layers
    return replaced(module, "forward", forward)


def before_each(pipe: Any, method: str, notify: list[Callable[[], None]]) -> AbstractContextManager[None]:
    """Within the context, ``notify`` are called ahead of a method of the pipeline's scheduler, or of a copy of it."""
    scheduler = getattr(pipe, "scheduler", None)
    if scheduler is None or not notify:
        return nullcontext()
    original, of_class = getattr(scheduler, method), getattr(type(scheduler), method)

    @functools.wraps(of_class)
    def notifying(self: Any, *args: Any, **kwargs: Any) -> Any:
        for one in notify:
            one()
        return original(*args, **kwargs) if self is scheduler else of_class(self, *args, **kwargs)

    return replaced(scheduler, method, MethodType(notifying, scheduler))  # copies get a method of their own
