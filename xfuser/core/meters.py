"""Meters: bytes sent to other ranks, time spent waiting for them, and bytes of live tensors.

All except waiting are counts, so they do not vary with the machine.
"""

import time
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import _functional_collectives as functional
from torch.distributed.distributed_c10d import _resolve_process_group
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OPERATIONS = {  # name where torch dispatches it, to the operation of torch.distributed
    "alltoall_base_": "all_to_all_single",
    "alltoall_": "all_to_all_single",
    "all_to_all_single": "all_to_all_single",
    "allgather_": "all_gather",
    "_allgather_base_": "all_gather",
    "all_gather_into_tensor": "all_gather",
    "allreduce_": "all_reduce",
    "all_reduce": "all_reduce",
    "all_reduce_": "all_reduce",
    "reduce_scatter_": "reduce_scatter",
    "_reduce_scatter_base_": "reduce_scatter",
    "reduce_scatter_tensor": "reduce_scatter",
    "broadcast_": "broadcast",
    "broadcast": "broadcast",
    "gather_": "gather",
    "scatter_": "scatter",
    "send": "send",
}


class Traffic(TorchDispatchMode):
    """Bytes that this rank sends to other ranks within the context: by operation (``sent``), and their ``total``.

    Collectives are counted where torch dispatches them, whoever calls them. The count assumes the usual algorithm of
    each collective: a ring for reductions; for a broadcast, one copy per receiver, sent by the source.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sent: dict[str, int] = {}

    @property
    def total(self) -> int:
        """Bytes sent by all operations."""
        return sum(self.sent.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        name = func._schema.name.partition("::")[2] if "c10d" in func.namespace else ""
        if name in OPERATIONS:
            given = {spec.name: value for spec, value in zip(func._schema.arguments, args, strict=False)}
            self._add(OPERATIONS[name], given | (kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _add(self, operation: str, given: dict[str, Any]) -> None:
        group = _group_of(given)
        size = group.size()
        own = next((given[name] for name in ("input_tensors", "input", "input_tensor", "tensors") if name in given), [])
        count = sum(x.nbytes for x in tree_leaves(own) if isinstance(x, Tensor))
        if operation == "all_to_all_single":
            counts = given.get("input_split_sizes")
            kept = count * counts[group.rank()] // max(1, sum(counts)) if counts else count // size
            sent = count - kept
        elif operation in ("broadcast", "scatter"):
            source = given.get("root_rank", given.get("src", 0)) == group.rank()
            sent = source * (count * (size - 1) if operation == "broadcast" else count - count // size)
        elif operation == "gather":
            sent = 0 if given.get("root_rank") == group.rank() else count
        else:
            shares = {"all_gather": size - 1, "all_reduce": 2 * (size - 1) / size, "reduce_scatter": (size - 1) / size}
            sent = int(count * shares.get(operation, 1))
        if sent:
            self.sent[operation] = self.sent.get(operation, 0) + sent


def _group_of(given: dict[str, Any]) -> dist.ProcessGroup:
    if "group_name" in given:
        return _resolve_process_group(given["group_name"])
    return dist.ProcessGroup.unbox(given["process_group"])


def traffic() -> Traffic:
    """Count the bytes sent within the context: ``with traffic() as sent``."""
    return Traffic()


class Waiting:
    """Intervals in which the calling thread waited for other ranks, as pairs of ``time.perf_counter`` values."""

    def __init__(self) -> None:
        self.waits: list[tuple[float, float]] = []

    def between(self, start: float, end: float) -> float:
        """Seconds of waiting between two ``time.perf_counter`` values."""
        return sum(max(0.0, min(b, end) - max(a, start)) for a, b in self.waits)


@contextmanager
def waiting() -> Iterator[Waiting]:
    """Measure waiting within the context. On an accelerator the device waits, not the caller: nothing is recorded."""
    meter = Waiting()

    def timed(original: Callable[..., Any]) -> Callable[..., Any]:
        def wait(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                meter.waits.append((start, time.perf_counter()))

        return wait

    with (
        mock.patch.object(dist.Work, "wait", timed(dist.Work.wait)),
        mock.patch.object(functional, "wait_tensor", timed(functional.wait_tensor)),
    ):
        yield meter


def peak_allocation(action: Callable[[], Any]) -> int:
    """Peak bytes that torch allocates on the CPU during ``action``, including workspaces of kernels."""
    with torch.no_grad(), profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        action()
    sizes = [event.nbytes() for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]"]
    return max(accumulate(sizes), default=0)


class LiveMemory(TorchDispatchMode):
    """Peak bytes of the live tensors that were created within the context (``peak``).

    The user sets ``epoch``; each tensor is tagged with the epoch in which it was created, or None.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self.epoch: int | None = None
        self._known: dict[int, tuple[int, int | None]] = {}

    def by_epoch(self) -> dict[int, int]:
        """Bytes of live tensors, by epoch."""
        sizes: dict[int, int] = {}
        for size, epoch in self._known.values():
            if epoch is not None:
                sizes[epoch] = sizes.get(epoch, 0) + size
        return sizes

    def alive(self) -> dict[int, int]:
        """Bytes counted for each live storage, by its key."""
        return {key: size for key, (size, _) in self._known.items()}

    def grow(self, key: int, size: int) -> None:
        """Count ``size`` more bytes until the storage with this key is freed; does nothing if it already is."""
        if key not in self._known:
            return
        known, epoch = self._known[key]
        self._known[key] = known + size, epoch
        self.live += size
        self.peak = max(self.peak, self.live)

    def free_of_epoch(self, tensors: Any) -> None:
        """Remove the epoch from all tensors in a nested structure."""
        for x in tree_leaves(tensors):
            if isinstance(x, Tensor) and (key := x.untyped_storage()._cdata) in self._known:
                self._known[key] = self._known[key][0], None

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func.namespace == "prim":  # only queries a tensor's properties
            return result
        inputs = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, Tensor) and not x.is_meta and x.untyped_storage()._cdata not in inputs:
                self._watch(x.untyped_storage())
        return result

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key in self._known:
            return
        self._known[key] = size, self.epoch
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._gone, key)

    def _gone(self, key: int) -> None:
        self.live -= self._known.pop(key)[0]
