"""Checks that raise an error for what no method supports."""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor

from xfuser.call import CallState, Forward
from xfuser.core.distributed import GroupCoordinator
from xfuser.core.hooks import Arguments
from xfuser.models.registry import UNCUT


class Refusals:
    """Checks each forward before it runs, and raises an error for what no method supports.

    Args:
        models: a pipeline's transformers.
    """

    def __init__(self, models: Iterable[nn.Module]) -> None:
        self._models = models

    def enter(self, call: CallState) -> None:
        """During the call, each forward is checked first."""
        for model in self._models:
            call.around(model, partial(self._wrapper, model))

    def _wrapper(self, model: nn.Module, forward: Forward, arguments: Arguments) -> Any:
        if torch.is_grad_enabled() and any(weight.requires_grad for weight in model.parameters()):
            raise ValueError("parallel forwards are for inference: call them within torch.no_grad()")
        return forward(arguments)


def refuse_offloaded(modules: Iterable[nn.Module], advice: str) -> None:
    """Raise a ValueError with this advice for a module whose layers load their weights only when they run."""
    for module in modules:
        if any(hasattr(part, "_hf_hook") and _lacks_weights(part) for part in module.modules()):
            raise ValueError(
                f"{type(module).__name__} is offloaded layer by layer, so its weights are not loaded: {advice}"
            )


def refuse_quantised(modules: Iterable[nn.Module]) -> None:
    """Raise a ValueError for a module whose weights are packed by a quantiser and so cannot be divided."""
    for module in modules:
        packed = (type(weight) for weight in module.parameters() if _is_packed(weight))
        kind = next(packed, None) or (getattr(module, "hf_quantizer", None) and type(module.hf_quantizer))
        if kind:
            raise ValueError(f"{type(module).__name__} is quantised ({kind.__name__}), and {UNCUT}")


def _is_packed(weight: nn.Parameter) -> bool:
    """Whether a parameter is of a quantiser's class; torch's own classes hold plain numbers."""
    return type(weight) is not nn.Parameter and not isinstance(weight, DTensor | FakeTensor)


def refuse_changed(changes: list[str], group: GroupCoordinator) -> None:
    """Raise a ValueError on all ranks of a group if the modules of a rank's model have changed since its division."""
    if found := [change for of_rank in group.all_gather_object(changes) for change in of_rank]:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise ValueError(
            f"{found[0]}{more} since the pipeline was wrapped, so its weights cannot be restored: undo the change"
            " (unload_lora_weights(), unfuse_qkv_projections() or the like), then call unwrap() again"
        )


def refusal(message: str) -> Callable[..., NoReturn]:
    """A replacement for a method that is not supported: it raises a ValueError with this message."""

    def refuse(*args: Any, **kwargs: Any) -> NoReturn:
        raise ValueError(message)

    return refuse


def _lacks_weights(module: nn.Module) -> bool:
    return any(weight.is_meta for weight in module.parameters(recurse=False))
