"""Meters that do not drift: bytes sent to other ranks, and bytes of live tensors."""

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from xfuser.core.distributed import GroupCoordinator
from xfuser.methods.pipefusion.channel import Channel


class Traffic:
    """Bytes that this rank sends to other ranks, by operation of ``torch.distributed``."""

    def __init__(self) -> None:
        self.sent: dict[str, int] = {}

    @property
    def total(self) -> int:
        return sum(self.sent.values())

    def add(self, operation: str, count: int) -> None:
        self.sent[operation] = self.sent.get(operation, 0) + count


@contextmanager
def traffic() -> Iterator[Traffic]:
    """Count what the library sends within the context."""
    meter = Traffic()

    def counted(name: str, size: Callable[..., int]) -> Any:
        original = getattr(dist, name)

        def call(*args: Any, **kwargs: Any) -> Any:
            meter.add(name, size(*args, **kwargs))
            return original(*args, **kwargs)

        return mock.patch.object(dist, name, call)

    def isend(group: GroupCoordinator, x: torch.Tensor, dst: int | None = None) -> dist.Work:
        meter.add("isend", x.nbytes)
        return start_sending(group, x, dst)

    def send(channel: Channel, x: torch.Tensor) -> None:
        meter.add("send", x.nbytes)
        start_passing(channel, x)

    start_sending, start_passing = GroupCoordinator.isend, Channel.send
    with (
        mock.patch.object(GroupCoordinator, "isend", isend),
        mock.patch.object(Channel, "send", send),
        counted("all_to_all_single", _all_to_all_bytes),
        counted("all_gather", lambda parts, x, group=None: x.nbytes * (len(parts) - 1)),
        counted("batch_isend_irecv", lambda ops: sum(op.tensor.nbytes for op in ops if op.op is dist.isend)),
    ):
        yield meter


def _all_to_all_bytes(output: Any, x: Any, outs: Any = None, counts: Any = None, group: Any = None, **_: Any) -> int:
    size, rank = dist.get_world_size(group), dist.get_rank(group)
    own = counts[rank] if counts else x.numel() // size
    return (x.numel() - own) * x.element_size()


def peak_allocation(action: Callable[[], Any]) -> int:
    """High-water mark of the bytes that torch allocates on the CPU during ``action``, with workspaces of kernels."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    sizes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(sizes), default=0)


class LiveMemory(TorchDispatchMode):
    """High-water mark of the bytes of tensors made within the context and still alive (``peak``)."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and not x.is_meta and x.untyped_storage()._cdata not in inputs:
                self._watch(x.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known.add(key)
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key, size)

    def _gone(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size
