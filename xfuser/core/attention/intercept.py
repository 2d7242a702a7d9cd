"""Replaces ``torch.nn.functional.scaled_dot_product_attention`` inside chosen attention modules, and only there."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode

Attend = Callable[..., torch.Tensor]


class _Interception(TorchFunctionMode):
    """Active during one call of one attention module; counts what it replaced."""

    def __init__(self, attend: Attend) -> None:
        super().__init__()
        self._attend = attend
        self._busy = False
        self.count = 0

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func is not F.scaled_dot_product_attention or self._busy:
            return func(*args, **(kwargs or {}))
        self.count += 1
        self._busy = True
        try:
            return self._attend(*what_matters(*args, **(kwargs or {})))
        finally:
            self._busy = False


def what_matters(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, float | None]:
    """Query, key, value, mask and scale of a call of ``scaled_dot_product_attention`` (``[B, H, S, D]``).

    Raises:
        ValueError: the call asks for what attention over shares does not do.
    """
    if is_causal or dropout_p:
        raise ValueError(
            f"attention over several ranks is neither causal (is_causal={is_causal}) nor has it dropout"
            f" (dropout_p={dropout_p}): put the model in eval mode"
        )
    return query, key, value, attn_mask, scale


@contextmanager
def intercepted(
    modules: dict[str, nn.Module], attend: Callable[[str], Attend], many: bool = False, idle: tuple[str, ...] = ()
) -> Iterator[None]:
    """Within the context, each of ``modules`` computes its attention by ``attend(name)``.

    The replacement takes query, key, value, mask and scale of ``scaled_dot_product_attention``. A module whose
    processor does not call that function exactly once per forward, or at least once with ``many``, raises a ValueError:
    its attention would not be the one intended. One of the arguments ``idle`` that is true says that it attends to
    nothing.
    """
    active: list[_Interception] = []
    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(partial(_enter, active, attend(name))))
        handles.append(
            module.register_forward_hook(partial(_leave, active, name, many, idle), with_kwargs=True, always_call=True)
        )
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
        while active:  # torch runs no forward hooks after a KeyboardInterrupt
            active.pop().__exit__(None, None, None)


def _enter(active: list[_Interception], attend: Attend, module: nn.Module, args: tuple) -> None:
    mode = _Interception(attend)
    mode.__enter__()
    active.append(mode)


def _leave(
    active: list[_Interception],
    name: str,
    many: bool,
    idle: tuple[str, ...],
    module: nn.Module,
    args: tuple,
    kwargs: dict[str, Any],
    output: Any,
) -> None:
    mode = active.pop()
    mode.__exit__(None, None, None)
    if not mode.count and any(kwargs.get(one) for one in idle):
        return
    if (
        not (mode.count == 1 or (many and mode.count)) and output is not None
    ):  # None: the forward raised, and says so itself
        processor = type(getattr(module, "processor", module)).__name__
        raise ValueError(
            f"{name}: {processor} called scaled_dot_product_attention {mode.count} times in one forward, and must"
            " call it once. Use the processors that the model came with, the attention backend 'native' where"
            " another was set, and no IP-adapter"
        )
