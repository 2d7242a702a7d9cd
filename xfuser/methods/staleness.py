"""Displaced patches (DistriFusion, arXiv 2402.19481): a rank computes its rows with the others' rows of the last step.

Activations of consecutive steps are similar. So a rank uses the other ranks' rows of the last step, while this step's
rows are sent during compute.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._pytree import tree_leaves

from xfuser.call import CallState, Forward
from xfuser.core.hooks import Arguments


class Staleness:
    """The exchanges of one transformer during a denoising loop: which of them wait, and the rows that each keeps.

    An exchange is identified by the index of the transformer's call within the step, its name, and the number of
    earlier exchanges of that name in this call. In the first call of an index, and whenever the shapes of its arguments
    change, all exchanges wait: otherwise a batch that dropped its unconditional half would use rows of other images.

    Args:
        group: the ranks that exchange rows; it must carry no other messages meanwhile.
        mode: one of ``MODES``.
        call: the wrapped call; in its synchronous steps, exchanges wait.
    """

    def __init__(self, group: dist.ProcessGroup, mode: str, call: CallState) -> None:
        self.mode, self.group, self._call = mode, group, call
        self._kept: dict[tuple[int, str, int], _Rows] = {}
        self._shapes: dict[int, list[torch.Size]] = {}  # of the arguments of each forward of the last step

    def restart(self) -> None:
        """Drop all rows, before the first step of another image."""
        for rows in self._kept.values():
            rows.settle()
        self._kept.clear()
        self._shapes.clear()

    def layer(self, forward: Forward, arguments: Arguments) -> Any:
        """The outer wrapper of the transformer's forward: sees full arguments, even if another rank computes it."""
        self._seen: dict[str, int] = {}
        shapes = [x.shape for x in tree_leaves(arguments) if isinstance(x, Tensor)]
        self._changed = self._shapes.get(self._call.index) != shapes
        self._shapes[self._call.index] = shapes
        return forward(arguments)

    @property
    def synchronous(self) -> bool:
        """Whether this call's exchanges wait."""
        return self.mode == "full_sync" or self._call.synchronous or self._changed

    @contextmanager
    def exchange(self, name: str, own: Tensor, sizes: list[int], wait: bool = False) -> Iterator[Tensor]:
        """Yield the rows of all ranks in rank order: this rank's are fresh; the mode decides whether others' are.

        Args:
            name: name of the exchange, the same on all ranks.
            own: this rank's rows, ``[sizes[rank], ...]``.
            sizes: number of rows of each rank.
            wait: whether others' rows must be fresh in any mode.
        """
        key = self._key(name)
        self._seen[name], rows = key[2], self._kept.get(key)
        if rows:
            rows.settle()
        fresh = rows is None or rows.kind != (sizes, own.shape[1:], own.dtype)
        if fresh:
            rows = self._kept[key] = _Rows(own, sizes, self.group)
        rows.own.copy_(own.detach())
        waits = fresh or wait or self.synchronous
        if waits:
            rows.start()
            rows.settle()
        yield rows.full
        if not waits and self.mode != "no_sync":
            rows.start()  # after their use, as received rows overwrite them

    @contextmanager
    def keys_and_values(self, name: str, key: Tensor, value: Tensor, sizes: list[int]) -> Iterator[tuple[Tensor, ...]]:
        """As :meth:`exchange`, for the keys and values of an attention, ``[B, H, S_local, D]``, in one message."""
        own = torch.cat([key, value], dim=-1).permute(2, 0, 1, 3)
        with self.exchange(name, own, sizes) as full:
            yield full.permute(1, 2, 0, 3).split([key.shape[-1], value.shape[-1]], dim=-1)

    def last(self, name: str) -> Tensor | None:
        """A copy of this rank's rows of the last step in the next exchange of that name; None if it had none."""
        rows = self._kept.get(self._key(name))
        return None if rows is None else rows.own.clone()

    def _key(self, name: str) -> tuple[int, str, int]:
        return self._call.index, name, self._seen.get(name, -1) + 1


class _Rows:
    """Rows of all ranks in one tensor; other ranks' rows are received in place."""

    def __init__(self, own: Tensor, sizes: list[int], group: dist.ProcessGroup) -> None:
        self.full = own.new_empty(sum(sizes), *own.shape[1:])
        self.kind = (sizes, own.shape[1:], own.dtype)  # the same on every rank
        self._group, self._rank, self._works = group, dist.get_rank(group), []
        self._parts = self.full.split(sizes)
        self.own = self._parts[self._rank]

    def start(self) -> None:
        """Send this rank's rows to all other ranks, and receive theirs."""
        others = [(rank, part) for rank, part in enumerate(self._parts) if rank != self._rank]
        messages = [(dist.irecv, part, rank) for rank, part in others if part.numel()]
        messages += [(dist.isend, self.own, rank) for rank, _ in others if self.own.numel()]
        operations = [dist.P2POp(op, x, group=self._group, group_peer=rank) for op, x, rank in messages]
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def settle(self) -> None:
        """Wait for the transfers in flight.

        On NCCL the compute stream waits, not the host: kernels queued later can read received rows and overwrite sent
        ones.
        """
        works, self._works = self._works, []
        for work in works:
            work.wait()
