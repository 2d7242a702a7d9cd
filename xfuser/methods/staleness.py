"""Displaced patches (DistriFusion, arXiv 2402.19481): a rank computes its rows from the others' of one step ago.

Activations of two steps that follow one another are much alike. So what a rank needs of the others' rows, it takes from
the last step, while this step's rows are on their way behind the compute.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
import torch.distributed as dist
from torch.utils._pytree import tree_leaves

from xfuser.call import CallState, Forward
from xfuser.core.hooks import Arguments


class Staleness:
    """The exchanges of one transformer during a denoising loop: which of them wait, and what each left behind.

    An exchange is known by the index of the transformer's call within the step, its name, and how often that name came
    in this call. In the first call of an index, and whenever its arguments' shapes change, all exchanges wait: a batch
    that has lost its unconditional half would else meet rows of other pictures.

    Args:
        group: the ranks that exchange rows; nothing else may travel on it meanwhile.
        mode: one of ``MODES``.
        call: the wrapped call; the exchanges of its synchronous steps wait.
    """

    def __init__(self, group: dist.ProcessGroup, mode: str, call: CallState) -> None:
        self.mode, self.group, self._call = mode, group, call
        self._kept: dict[tuple[int, str, int], _Rows] = {}
        self._shapes: dict[int, list[torch.Size]] = {}  # of the arguments of each forward of the last step

    def restart(self) -> None:
        """Forget all: what comes next is another image's first step."""
        self.settle()
        self._kept.clear()
        self._shapes.clear()

    def layer(self, forward: Forward, arguments: Arguments) -> Any:
        """The outer layer of the transformer's forward: sees whole arguments, also where another rank computes it."""
        self._seen: dict[str, int] = {}
        shapes = [x.shape for x in tree_leaves(arguments) if isinstance(x, torch.Tensor)]
        self._changed = self._shapes.get(self._call.index) != shapes
        self._shapes[self._call.index] = shapes
        return forward(arguments)

    @property
    def synchronous(self) -> bool:
        """Whether this call's exchanges wait."""
        return self.mode == "full_sync" or self._call.synchronous or self._changed

    @contextmanager
    def exchange(self, name: str, own: torch.Tensor, sizes: list[int], wait: bool = False) -> Iterator[torch.Tensor]:
        """Within the context, the rows of all ranks, in rank order: its own fresh, others' as the mode says.

        Args:
            name: of what is exchanged, the same on all ranks.
            own: this rank's rows, ``[sizes[rank], ...]``.
            sizes: rows of every rank.
            wait: whether others' rows are to be those of this step in any case.
        """
        nth = self._seen[name] = self._seen.get(name, -1) + 1
        key = (self._call.index, name, nth)
        rows = self._kept.get(key)
        fresh = rows is None or not rows.fit(own, sizes)
        if fresh:
            if rows:
                rows.settle()
            rows = self._kept[key] = _Rows(own, sizes, self.group)
        rows.renew(own)
        if fresh or wait or self.synchronous:
            rows.start()
            rows.settle()
            yield rows.whole
        else:
            yield rows.whole
            if self.mode != "no_sync":
                rows.start()  # behind their use: what arrives overwrites them

    @contextmanager
    def keys_and_values(
        self, name: str, key: torch.Tensor, value: torch.Tensor, sizes: list[int]
    ) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """As :meth:`exchange`, for this rank's keys and values of an attention, ``[B, H, S_local, D]``: one message."""
        own = torch.cat([key, value], dim=-1).permute(2, 0, 1, 3)
        with self.exchange(name, own, sizes) as whole:
            yield whole.permute(1, 2, 0, 3).split([key.shape[-1], value.shape[-1]], dim=-1)

    def last(self, name: str) -> torch.Tensor | None:
        """This rank's rows in the exchange of that name that comes next, as they were one step ago; None if there were
        none."""
        rows = self._kept.get((self._call.index, name, self._seen.get(name, -1) + 1))
        return None if rows is None else rows.own.clone()

    def settle(self) -> None:
        """Wait for all that is under way."""
        for rows in self._kept.values():
            rows.settle()


class _Rows:
    """Rows of all ranks in one tensor; those of others arrive right where they belong."""

    def __init__(self, own: torch.Tensor, sizes: list[int], group: dist.ProcessGroup) -> None:
        self.whole = own.new_empty(sum(sizes), *own.shape[1:])
        self._sizes, self._group, self._works = sizes, group, []
        starts = [0, *accumulate(sizes)]
        self._parts = [self.whole[start : start + size] for start, size in zip(starts, sizes, strict=False)]
        self.own = self._parts[dist.get_rank(group)]

    def fit(self, own: torch.Tensor, sizes: list[int]) -> bool:
        """Whether these are rows like those from before, on every rank."""
        return sizes == self._sizes and own.shape[1:] == self.whole.shape[1:] and own.dtype == self.whole.dtype

    def renew(self, own: torch.Tensor) -> None:
        self.settle()
        self.own.copy_(own.detach())

    def start(self) -> None:
        """Send the own rows to all others, and receive theirs."""
        peers = [rank for rank in range(len(self._parts)) if rank != dist.get_rank(self._group)]
        messages: list[tuple[Callable, torch.Tensor, int]] = [(dist.irecv, self._parts[peer], peer) for peer in peers]
        messages += [(dist.isend, self.own, peer) for peer in peers]
        operations = [
            dist.P2POp(send_or_receive, x, group=self._group, group_peer=peer)
            for send_or_receive, x, peer in messages
            if x.numel()
        ]
        self._works = dist.batch_isend_irecv(operations) if operations else []

    def settle(self) -> None:
        works, self._works = self._works, []
        for work in works:
            work.wait()
