"""Detects random numbers in work that is split over ranks, as each rank would draw different ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class RandomWatch(TorchDispatchMode):
    """Within the context, ``before_draw(name)`` is called before each operator that draws random numbers."""

    def __init__(self, before_draw: Callable[[str], None]) -> None:
        super().__init__()
        self._before_draw = before_draw

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if torch.Tag.nondeterministic_seeded in func.tags and _draws(func, args, kwargs or {}):
            self._before_draw(func._schema.name.removeprefix("aten::"))
        return func(*args, **(kwargs or {}))


def _draws(func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
    """Whether the operator draws random numbers; attention does so only for dropout."""
    names = [argument.name for argument in func._schema.arguments]
    if "dropout_p" not in names:
        return True
    place = names.index("dropout_p")
    return bool(kwargs.get("dropout_p", args[place] if len(args) > place else 0.0))
