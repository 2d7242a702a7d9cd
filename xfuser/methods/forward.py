"""Hooks by argument name: how a method takes part in the forward of an unmodified module."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
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
def layered_forward(module: nn.Module, layers: list[Layer]) -> Iterator[None]:
    """Within the context, ``module``'s forward runs inside ``layers``, the first one outermost.

    A layer is called as ``layer(call, arguments)``, and calls ``call(arguments)`` to go on, or not.
    """
    original = module.forward
    own = module.__dict__.get("forward")
    signature = inspect.signature(original)

    def innermost(arguments: Arguments) -> Any:
        return original(**arguments)

    call: Call = innermost
    for layer in reversed(layers):
        call = functools.partial(layer, call)

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        return call(arguments_of(signature, args, kwargs))

    module.forward = forward
    try:
        yield
    finally:
        if own is None:
            del module.forward
        else:
            module.forward = own


@contextmanager
def edited_arguments(module: nn.Module, edit: Callable[[Arguments], None]) -> Iterator[None]:
    """Within the context, ``edit`` changes the arguments of each call of ``module`` in place before it runs."""
    signature = inspect.signature(module.forward)

    def hook(_: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, Arguments]:
        arguments = arguments_of(signature, args, kwargs)
        edit(arguments)
        return (), arguments

    handle = module.register_forward_pre_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()
