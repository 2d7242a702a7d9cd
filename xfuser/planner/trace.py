"""Trace one rank's call as a list of events: operators with their cost, messages, and waits for messages.

The events are those that a device's queue would get. Operators are recorded where torch dispatches them, messages where
``torch.distributed`` passes them to a process group, and waits at ``Work.wait``. Nothing needs to be computed: the
tensors may be fake.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any, NamedTuple
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from xfuser.core.meters import Traffic

CACHES = (0, 6, 40, 50, 60, 72, 96, 126)  # MB
MATMUL, ATTENTION, MEMORY = KINDS = "matrix products", "attention", "memory"
ALLOCATIONS = ("empty", "new_empty", "empty_like", "empty_strided", "new_empty_strided", "detach")
ALLOCATIONS += ("lift_fresh", "set_", "_unsafe_view", "alias")
MESSAGES = {  # process group methods of different torch releases, by operation
    "all_to_all": ("alltoall_base", "all_to_all_single", "alltoall"),
    "all_gather": ("allgather", "_allgather_base", "all_gather", "all_gather_single"),
    "all_reduce": ("allreduce", "all_reduce"),
    "reduce_scatter": ("reduce_scatter", "_reduce_scatter_base", "reduce_scatter_single"),
    "broadcast": ("broadcast",),
    "gather": ("gather",),
    "scatter": ("scatter",),
    "send": ("send",),
    "recv": ("recv",),
}


def _all_places(x: Tensor) -> Tensor:
    """``nonzero`` of a mask with unknown values: assumes that all of them are nonzero."""
    return torch.empty(x.numel(), x.dim(), dtype=torch.long, device=x.device)


EXPONENTIALS = ("gelu",)  # operators of transformer blocks that compute one per element
NONZERO = torch.ops.aten.nonzero.default


class Operator(NamedTuple):
    """One kernel: ``flops`` of a matrix product or an attention, and bytes moved.

    ``scores``: attention scores, or the elements of which an activation computes the exponential.

    ``reads`` and ``writes``: tensors, by number, with their bytes. A compiler that fuses operators saves the bytes of
    tensors that are used only between them.
    """

    kind: str
    flops: float
    scores: float
    wide: bool  # float32 or wider
    reads: tuple[tuple[int, int], ...]
    writes: tuple[tuple[int, int], ...]
    tiles: float = 0.0  # 128 x 128 output tiles of a matrix product
    convolution: bool = False  # whether the product is a convolution
    norm: int = 0  # number of the RMS norm that it is a part of: a GPU computes one by one kernel, a CPU by several

    @property
    def bytes(self) -> int:
        """Bytes read and written."""
        return sum(size for _, size in self.reads) + sum(size for _, size in self.writes)


class Message(NamedTuple):
    """``sent`` bytes of this rank over a group of ``ranks``; a :class:`Wait` refers to it by ``number``."""

    number: int
    operation: str
    ranks: tuple[int, ...]
    sent: int


class Wait(NamedTuple):
    """The device waits for a message."""

    number: int


class Mark(NamedTuple):
    """Start of a part of the call: a step and patch of a transformer, or a component by name."""

    part: str
    step: int = 0
    patch: int = 0


Event = Operator | Message | Wait | Mark | tuple


@dataclass
class Trace:
    """Events in the order of a rank's program; ``(events, count)`` is a block that runs ``count`` times."""

    events: list[Event] = field(default_factory=list)

    def parts(self) -> dict[Mark, list[Event]]:
        """The events of each part, concatenated if a part occurs several times."""
        found: dict[Mark, list[Event]] = {}
        now = found.setdefault(Mark("pipeline"), [])
        for event in self.events:
            if isinstance(event, Mark):
                now = found.setdefault(event, [])
            else:
                now.append(event)
        return found


class Tracer(TorchDispatchMode):
    """Records a :class:`Trace` of what runs within the context; reentrant."""

    def __init__(self) -> None:
        super().__init__()
        self.trace = Trace()
        self.traffic = Traffic()
        self._busy = False
        self._numbers: dict[int, tuple[int, Any]] = {}
        self._works: dict[int, tuple[Any, int]] = {}
        self._count = self._messages = self._norms = self._norm = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if self._busy or func.namespace in ("c10d", "prim"):
            return func(*args, **kwargs)
        self._busy = True
        try:
            result = (
                _all_places(*args) if func is NONZERO and isinstance(args[0], FakeTensor) else func(*args, **kwargs)
            )
        finally:
            self._busy = False
        if not func.is_view and func._schema.name.partition("::")[2] not in ALLOCATIONS:
            self._note(func, args, kwargs, result)
        return result

    def _note(self, func: Any, args: tuple, kwargs: dict[str, Any], result: Any) -> None:
        outputs = [x for x in tree_leaves(result) if isinstance(x, Tensor)]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        moved = sum(x.numel() for x in outputs)
        if not outputs or moved <= 1:
            return
        reads = tuple((self._number(x), _held(x)) for x in inputs)
        writes = tuple((self._number(x), _held(x)) for x in outputs)
        kind, flops, scores, tiles = _cost(func, args, kwargs, result, inputs)
        wide = bool(inputs) and inputs[0].dtype in (torch.float32, torch.float64)
        convolution = "conv" in func._schema.name
        self.trace.events.append(Operator(kind, flops, scores, wide, reads, writes, tiles, convolution, self._norm))
        if convolution and not wide:  # its maps are converted to its memory layout, and back
            self.trace.events.append(Operator(MEMORY, 0.0, 0.0, wide, reads, writes))

    def _number(self, x: Tensor) -> int:
        """A number for the tensor's storage, constant while the storage is alive."""
        storage = x.untyped_storage()
        key = storage._cdata
        known = self._numbers.get(key)
        if known is None or known[1].expired():
            self._count += 1
            known = self._numbers[key] = self._count, torch.multiprocessing.reductions.StorageWeakRef(storage)
        return known[0]

    @contextmanager
    def messages(self) -> Iterator[None]:
        """Context in which messages and waits are recorded, and which operators make up an RMS norm."""
        with ExitStack() as stack:
            stack.enter_context(self.traffic)
            stack.enter_context(mock.patch.object(torch, "rms_norm", self._numbering(torch.rms_norm)))
            for operation, names in MESSAGES.items():
                for name in (name for name in names if hasattr(dist.ProcessGroup, name)):
                    sending = self._sending(operation, getattr(dist.ProcessGroup, name))
                    stack.enter_context(mock.patch.object(dist.ProcessGroup, name, sending))
            self._stack, self._waited = stack, set()
            yield

    def _numbering(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def norm(*args: Any, **kwargs: Any) -> Any:
            self._norms += 1
            self._norm = self._norms
            try:
                return original(*args, **kwargs)
            finally:
                self._norm = 0

        return norm

    def _sending(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def send(group: Any, tensors: Any, *args: Any, **kwargs: Any) -> Any:
            before = self.traffic.total
            work = original(group, tensors, *args, **kwargs)
            sent = self.traffic.total - before
            if group.size() > 1:
                self._messages += 1
                ranks = tuple(dist.get_process_group_ranks(group))
                if name == "recv":
                    sent = sum(x.nbytes for x in tensors)
                self.trace.events.append(Message(self._messages, name, ranks, sent))
                self._works[id(work)] = work, self._messages
                if type(work) not in self._waited:  # each backend has its own class
                    self._waited.add(type(work))
                    waiting = self._waiting(type(work).wait)
                    self._stack.enter_context(mock.patch.object(type(work), "wait", waiting))
            return work

        return send

    def _waiting(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def wait(work: Any, *args: Any, **kwargs: Any) -> Any:
            found = self._works.pop(id(work), None)
            if found:
                self.trace.events.append(Wait(found[1]))
            return original(work, *args, **kwargs)

        return wait


def _held(x: Tensor) -> int:
    """Bytes read or written for a tensor; an expanded view counts its storage only once."""
    return min(x.numel() * x.element_size(), x.untyped_storage().nbytes())


def _cost(
    func: Any, args: tuple, kwargs: dict[str, Any], result: Any, inputs: list[Tensor]
) -> tuple[str, float, float, float]:
    """Kind, FLOPs, scores or exponentials, and (for matrix products) tiles of an operator."""
    name = func._schema.name
    if "scaled_dot_product" in name and "math" not in name:
        q, k, v = inputs[:3]
        scores = math.prod(q.shape[:-1]) * k.shape[-2]
        return ATTENTION, 2.0 * scores * (q.shape[-1] + v.shape[-1]), float(scores), 0.0
    count = flop_registry.get(func._overloadpacket)
    if count is None:
        is_activation = name.partition("::")[2] in EXPONENTIALS
        return MEMORY, 0.0, float(inputs[0].numel()) if is_activation else 0.0, 0.0
    out = result if isinstance(result, Tensor) else result[0]
    rows, columns = (out.shape[-2], out.shape[-1]) if "mm" in name else (out.numel() // out.shape[1], out.shape[1])
    batch = math.prod(out.shape[:-2]) if "mm" in name else 1
    tiles = batch * math.ceil(rows / 128) * math.ceil(columns / 128)
    return MATMUL, float(count(*args, **kwargs, out_val=result)), 0.0, float(tiles)
