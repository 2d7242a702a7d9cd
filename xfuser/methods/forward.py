"""Hooks by argument name: how a method takes part in the forward of an unmodified module."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from types import MethodType
from typing import Any

from torch import nn

Arguments = dict[str, Any]
Call = Callable[[Arguments], Any]
Layer = Callable[[Call, Arguments], Any]


def arguments_of(signature: inspect.Signature, args: tuple, kwargs: dict[str, Any]) -> Arguments:
    """The arguments of a call by name, whether they were given by position or by keyword."""
    bound = signature.bind(*args, **kwargs).arguments
    for name, parameter in signature.parameters.items():
        if parameter.kind is inspect.Parameter.VAR_KEYWORD:
            bound.update(bound.pop(name, {}))
    return bound


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within the context, ``owner`` has its own attribute ``name``; afterwards all is as before."""
    absent = object()
    before = owner.__dict__.get(name, absent)
    setattr(owner, name, value)
    try:
        yield
    finally:
        if before is absent:
            delattr(owner, name)
        else:
            setattr(owner, name, before)


def layered_forward(module: nn.Module, layers: list[Layer]) -> AbstractContextManager[None]:
    """Within the context, ``module``'s forward runs inside ``layers``, the first one outermost.

    A layer is called as ``layer(call, arguments)``, and calls ``call(arguments)`` to go on, or not.

    Raises:
        RuntimeError: the module's forward is layered already.
    """
    original = module.forward
    if hasattr(original, "layers"):
        raise RuntimeError(f"{type(module).__name__} runs in parallel already: active() and calls do not nest")
    signature = inspect.signature(original)

    def innermost(arguments: Arguments) -> Any:
        return original(**arguments)

    call: Call = innermost
    for layer in reversed(layers):
        call = functools.partial(layer, call)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(arguments_of(signature, args, kwargs))

    forward.layers = layers
    return replaced(module, "forward", forward)


@contextmanager
def edited_arguments(module: nn.Module, edit: Callable[[Arguments], None]) -> Iterator[None]:
    """Within the context, ``edit`` changes the arguments of each call of ``module`` in place before it runs."""
    signature = inspect.signature(module.forward)
    names = list(signature.parameters)
    rest = next((name for name in names if signature.parameters[name].kind is inspect.Parameter.VAR_POSITIONAL), None)

    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, Arguments]:
        arguments = arguments_of(signature, args, kwargs)
        edit(arguments)
        if rest not in arguments:
            return (), arguments
        ahead = [arguments.pop(name) for name in names[: names.index(rest)]]
        return (*ahead, *arguments.pop(rest)), arguments

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


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
