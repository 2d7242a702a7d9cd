"""Hooks into unmodified modules: attributes that are replaced temporarily, and arguments bound by name."""

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from torch import nn

Arguments = dict[str, Any]


@contextmanager
def replaced(owner: Any, name: str, value: Any) -> Iterator[None]:
    """Within the context, ``owner``'s own attribute ``name`` is ``value``; its previous state is restored after it."""
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


@contextmanager
def edited_output(module: nn.Module, edit: Callable[[Any], Any]) -> Iterator[None]:
    """Within the context, ``edit(output)`` replaces the output of each call of ``module``."""
    handle = module.register_forward_hook(lambda module, args, output: edit(output))
    try:
        yield
    finally:
        handle.remove()


def innermost(module: nn.Module) -> tuple[Any, str]:
    """Where a module's own forward is stored: ``(owner, name of the attribute)``.

    The hooks of Diffusers' registry (caches, group offload) run around this forward and may skip it. Without such hooks
    it is the module's ``forward``.
    """
    registry = vars(module).get("_diffusers_hook")
    if registry is None or not registry.hooks:
        return module, "forward"
    reference = registry._fn_refs[0]
    return reference, "forward" if reference.original_forward is None else "original_forward"


class Binder:
    """Maps the arguments of a function's calls to their names. The signature is read once."""

    def __init__(self, function: Callable[..., Any]) -> None:
        self._signature = inspect.signature(function)
        kinds = {name: parameter.kind for name, parameter in self._signature.parameters.items()}
        self.rest = next((name for name, kind in kinds.items() if kind is inspect.Parameter.VAR_POSITIONAL), None)
        named = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.names = [name for name, kind in kinds.items() if kind in named]

    def __call__(self, args: tuple, kwargs: dict[str, Any]) -> Arguments:
        """The arguments by name, whether passed by position or by keyword.

        Raises:
            TypeError: there are too many positional arguments, or an argument is passed twice.
        """
        arguments = dict(zip(self.names, args, strict=False))
        if len(args) > len(self.names) and self.rest:
            arguments[self.rest] = args[len(self.names) :]
        elif len(args) > len(self.names) or any(name in arguments for name in kwargs):
            self._signature.bind(*args, **kwargs)  # raises a TypeError that names the problem
        return arguments | kwargs


def by_name(original: Callable[..., Any], function: Callable[[Arguments], Any]) -> Callable[..., Any]:
    """A function with the signature of ``original`` that passes its arguments by name to ``function``."""
    bind = Binder(original)

    @functools.wraps(original)
    def bound(*args: Any, **kwargs: Any) -> Any:
        return function(bind(args, kwargs))

    return bound


def edited_arguments(module: nn.Module, edit: Callable[[Arguments], None]) -> AbstractContextManager[None]:
    """Within the context, ``edit`` changes the arguments of each call of ``module`` in place before it runs."""
    original = module.forward
    bind = Binder(getattr(*innermost(module)))
    ahead = bind.names if bind.rest else []  # more arguments can follow only positional ones

    @functools.wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        arguments = bind(args, kwargs)
        edit(arguments)
        if bind.rest not in arguments:
            return original(**arguments)
        return original(*(arguments.pop(name) for name in ahead), *arguments.pop(bind.rest), **arguments)

    return replaced(module, "forward", forward)
