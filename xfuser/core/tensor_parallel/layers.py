"""How the forward of a module that keeps a part of its weights is completed by the other ranks.

A divided module is the module that it was, of a class made for the purpose: its place in the model, its hooks and its
base class stay.
"""

import functools
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from xfuser.core.distributed import GroupCoordinator
from xfuser.core.gradients import forward_only

if TYPE_CHECKING:
    from xfuser.core.tensor_parallel.division import Cut


class Divided:
    """Mixed into the class of a divided module; ``_cut`` is of its outputs, inputs or channels, as subclasses say."""

    _cut: "Cut"
    _group: GroupCoordinator

    def undivided(self) -> None:
        """Make the module one of its own class again."""
        self.__class__ = type(self).__bases__[1]
        del self.__dict__["_cut"], self.__dict__["_group"]

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        with torch.no_grad():
            out = self._complete(x, *args, **kwargs)
        return forward_only(out, x, *self.parameters(recurse=False))

    def _complete(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        raise NotImplementedError


class Gathered(Divided):
    """Keeps some outputs (``_cut``), and gathers those of all ranks. No sum is divided."""

    def _complete(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        own = super(Divided, self).forward(x, *args, **kwargs)
        dim = -1 if isinstance(self, nn.Linear | nn.Embedding) else 1
        return self._group.all_gather(own, dim=dim, sizes=self._cut.sizes)


class Summed(Divided):
    """Keeps the weights of some inputs (``_cut``), gets these alone, and sums the outputs over the ranks."""

    def _complete(self, x: torch.Tensor) -> torch.Tensor:
        is_linear = isinstance(self, nn.Linear)
        out = self._group.all_reduce(
            F.linear(x, self.weight) if is_linear else self._conv_forward(x, self.weight, None)
        )
        if self.bias is None:
            return out
        return out + (self.bias if is_linear else self.bias.view(-1, *[1] * (self.weight.dim() - 2)))


class SummedOfAll(Summed):
    """As :class:`Summed`, but gets all inputs, and takes its own."""

    def _complete(self, x: torch.Tensor) -> torch.Tensor:
        dim = x.dim() - 1 if isinstance(self, nn.Linear) else 1
        inputs = self._cut.kept[self._group.rank_in_group][0]
        return super()._complete(x.narrow(dim, inputs.start, len(inputs)))


class SpanningRMSNorm(Divided):
    """An RMS norm over the channels of all heads (``_cut``), of which it gets some: the mean square is of all ranks."""

    def _complete(self, x: torch.Tensor) -> torch.Tensor:
        squares = x.float().square().sum(-1, keepdim=True)
        own = squares / x.shape[-1]
        whole = self._group.all_reduce(squares) / self._cut.total
        eps = torch.finfo(x.dtype).eps if self.eps is None else self.eps
        out = super(Divided, self).forward(x)
        return (out * ((own + eps) / (whole + eps)).sqrt()).to(out.dtype)


class SpanningNorm(Divided):
    """Another norm over the channels of all heads (``_cut``): they are gathered, and normalised whole."""

    def _complete(self, x: torch.Tensor) -> torch.Tensor:
        parts = self._group.all_gather(x, dim=-1, separate_tensors=True, sizes=self._cut.sizes)
        return self._cut.part(super(Divided, self).forward(self._cut.whole(parts)), self._group.rank_in_group)


def completed(module: nn.Module, kind: type[Divided], cut: "Cut", group: GroupCoordinator) -> None:
    """Make a module complete its forward in this way, in place."""
    module.__class__ = _class_of(kind, type(module))
    module.__dict__.update(_cut=cut, _group=group)


@functools.cache
def _class_of(kind: type[Divided], cls: type[nn.Module]) -> type[nn.Module]:
    return type(f"{kind.__name__}{cls.__name__}", (kind, cls), {})
