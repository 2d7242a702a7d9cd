"""Means over the ranks that share a forward, by which a cache decides as on one rank."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from xfuser.call import CallState
from xfuser.core.distributed import get_branch_group, get_forward_group
from xfuser.models.plan import Streams

T = TypeVar("T")


class SharedMeans:
    """Gives a rule that computes means of whole tensors the means over all ranks, at the cost of one all-reduce."""

    def __init__(self, call: CallState) -> None:
        self._call = call

    def decide(self, rule: Callable[[], T], streams: Streams) -> T:
        """Return the result of ``rule`` with each ``x.mean()`` in it taken over all ranks' tokens and batch entries.

        The rule runs twice, first with this rank's means, and must have no side effects. One all-reduce sums all means,
        with 16 bytes for each; a rule without means needs no all-reduce.

        Args:
            streams: streams of the tensors' tokens, ``[B, own tokens, D]``; tensors without tokens are used whole.
        """
        group = get_branch_group() if self._call.apart else get_forward_group()
        if group.world_size == 1:
            return rule()
        seen: list[Tensor] = []

        def own(x: Tensor) -> Tensor:
            seen.append(x)
            return x.mean()

        with _Means(own):
            result = rule()
        if not seen:
            return result
        sums = [value for x in seen for value in self._sum_and_count(x, streams)]
        totals = group.all_reduce(torch.stack(sums))
        means = iter((totals[::2] / totals[1::2]).unbind())
        with _Means(lambda x: next(means).to(x.dtype)):
            return rule()

    def _sum_and_count(self, x: Tensor, streams: Streams) -> tuple[Tensor, Tensor]:
        """Sum and count of the elements that no other rank counts."""
        counted = self._counted(x, streams) if self._call.gives else x.flatten()[:0]
        total = counted.sum(dtype=torch.float64)
        return total, torch.full_like(total, counted.numel())

    def _counted(self, x: Tensor, streams: Streams) -> Tensor:
        shares = self._call.tokens
        if shares is None or shares.is_whole or x.dim() < 3:
            return x
        if x.shape[1] != sum(shares.sizes[stream][shares.rank] for stream in streams):
            return x
        return shares.rows(streams, x.shape[1]).given(x, 1, shares.rank)


class _Means(TorchFunctionMode):
    """Within the context, the mean of a whole tensor is ``mean(x)``."""

    def __init__(self, mean: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._mean = mean

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if func in (Tensor.mean, torch.mean) and len(args) == 1 and not kwargs:
            return self._mean(args[0])
        return func(*args, **(kwargs or {}))
