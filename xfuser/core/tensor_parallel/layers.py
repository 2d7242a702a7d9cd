"""Completes the forward of a module that keeps a part of its weights, with the other ranks.

A divided module stays the same object and only changes its class, to a subclass of the original: its place in the model
and its hooks stay.
"""

import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfuser.core.distributed import GroupCoordinator
from xfuser.core.gradients import forward_only
from xfuser.core.tensor_parallel.shards import Shards


class Divided:
    """Mixin for the class of a divided module; ``_shards`` are of outputs, inputs or channels, by subclass."""

    _shards: Shards
    _group: GroupCoordinator

    def undivided(self) -> None:
        """Restore the module's original class."""
        self.__class__ = type(self).__bases__[1]
        del self.__dict__["_shards"], self.__dict__["_group"]


def _for_inference(forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Run a forward without gradients; ``backward()`` through its output raises a ValueError."""

    @functools.wraps(forward)
    def wrapper(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        with torch.no_grad():
            out = forward(self, *args, **kwargs)
        given = (x for x in (*args, *kwargs.values()) if isinstance(x, Tensor))
        return forward_only(out, *given, *self.parameters(recurse=False))

    return wrapper


class Gathered(Divided):
    """Computes some outputs, and gathers those of all ranks. No sum is divided."""

    @_for_inference
    def forward(self, input: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """All outputs; this rank computes its own and gathers the others."""
        own = super().forward(input, *args, **kwargs)
        dim = -1 if isinstance(self, nn.Linear | nn.Embedding) else 1
        return self._group.all_gather(own, dim=dim, sizes=self._shards.sizes)


class Summed(Divided):
    """Keeps the weights of some inputs, gets only these inputs, and sums the outputs over the ranks."""

    @_for_inference
    def forward(self, input: Tensor) -> Tensor:
        """All outputs, summed over the ranks; the bias is added once."""
        is_linear = isinstance(self, nn.Linear)
        out = F.linear(input, self.weight) if is_linear else self._conv_forward(input, self.weight, None)
        out = self._group.all_reduce(out)
        if self.bias is None:
            return out
        return out + (self.bias if is_linear else self.bias.view(-1, *[1] * (self.weight.dim() - 2)))


class SummedOfAll(Summed):
    """As :class:`Summed`, but gets all inputs, and selects its own."""

    def forward(self, input: Tensor) -> Tensor:
        """Select this rank's inputs, then run as :class:`Summed`."""
        dim = input.dim() - 1 if isinstance(self, nn.Linear) else 1
        return super().forward(self._shards.part(input, dim, self._group.rank_in_group))


class SpanningRMSNorm(Divided):
    """An RMS norm over the channels of all heads, of which it gets some: the mean square is taken over all ranks."""

    @_for_inference
    def forward(self, x: Tensor) -> Tensor:
        """Normalise this rank's channels by the mean square of all."""
        squares = x.float().square().sum(-1, keepdim=True)
        own = squares / x.shape[-1]
        mean = self._group.all_reduce(squares) / self._shards.total
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        out = super().forward(x)
        return (out * ((own + eps) / (mean + eps)).sqrt()).to(out.dtype)


class SpanningNorm(Divided):
    """Any other norm over the channels of all heads: each rank gathers and normalises all of them."""

    @_for_inference
    def forward(self, x: Tensor) -> Tensor:
        """Normalise the channels of all ranks; return this rank's."""
        parts = self._group.all_gather(x, dim=-1, separate_tensors=True, sizes=self._shards.sizes)
        return self._shards.part(super().forward(self._shards.full(parts, -1)), -1, self._group.rank_in_group)


def complete(module: nn.Module, kind: type[Divided], shards: Shards, group: GroupCoordinator) -> None:
    """Change a module's class in place, so that ``kind`` completes its forward."""
    module.__class__ = _class_of(kind, type(module))
    module.__dict__.update(_shards=shards, _group=group)


@functools.cache
def _class_of(kind: type[Divided], cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"{kind.__name__}{cls.__name__}", (kind, cls), {})
