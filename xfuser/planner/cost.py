"""Convert events to seconds: the longest chain over a device's queue, its host, and its links.

The host issues operators one after the other. The device computes them in that order, each after its issue. A message
starts once it is issued, the device has finished the work before it, and its link is free. A wait blocks the device
until a message is complete. Nothing here depends on a model or a method: which work overlaps follows from the order in
which the engine issues it.
"""

from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np

from xfuser.planner.machines import Machine
from xfuser.planner.trace import ATTENTION, CACHES, KINDS, MATMUL, MEMORY, Event, Message, Operator, Wait

LINKS, BUBBLES, HOST, VAE, TEXT = "links", "bubbles", "host", "VAE", "text encoders"
CALLS = 2  # host cost of a message, in operators: one to issue it, one to wait
NEAR = 8  # maximum number of operators that prepare or unpack a message
SIZES = np.array(CACHES) * 1e6
PARTS = (*KINDS, LINKS, BUBBLES, HOST, VAE, TEXT)  # where the seconds of a call go


class Operators(NamedTuple):
    """Operators as arrays.

    ``eager``: whether the operator runs uncompiled; ``missed`` has a column for each cache size in ``CACHES``.
    """

    kinds: np.ndarray
    flops: np.ndarray
    scores: np.ndarray
    bytes: np.ndarray
    wide: np.ndarray
    tiles: np.ndarray
    convolutions: np.ndarray
    eager: np.ndarray
    missed: np.ndarray


class Repeat(NamedTuple):
    """A program that runs ``count`` times."""

    program: "Program"
    count: int


class Run(NamedTuple):
    """Operators without a message between them: a range of indices into a program's arrays."""

    start: int
    stop: int


@dataclass
class Program:
    """The work queued on a rank: steps, and the operators of all its runs."""

    steps: list[Run | Message | Wait | Repeat]
    operators: Operators | None


def program_of(events: Iterable[Event], fused: bool = False, norms: bool = False) -> Program:
    """Convert events to a program for :class:`Clock`.

    ``fused``: fuse operators as a compiler does; ``norms``: those of an RMS norm, as eager GPUs do.
    """
    steps: list[Any] = []
    known: dict[int, Program] = {}
    kept: list[tuple[Operator, bool, np.ndarray]] = []
    events = with_norms(events) if norms else list(events)
    events, eager = fuse(events) if fused else (events, [True] * len(events))
    for event, is_eager, missed in zip(events, eager, _missed(events), strict=True):
        if isinstance(event, Operator):
            start = steps.pop().start if steps and isinstance(steps[-1], Run) else len(kept)
            kept.append((event, is_eager, missed))
            steps.append(Run(start, len(kept)))
        elif isinstance(event, Message | Wait):
            steps.append(event)
        else:
            key = id(event[0])
            inner = known.get(key) or known.setdefault(key, program_of(event[0], fused, norms))
            count = event[1]
            if steps and isinstance(steps[-1], Repeat) and steps[-1].program is inner:
                count += steps.pop().count
            steps.append(Repeat(inner, count))
    return Program(steps, _arrays(kept) if kept else None)


def _arrays(kept: list[tuple[Operator, bool, np.ndarray]]) -> Operators:
    columns = [
        [KINDS.index(x.kind), x.flops, x.scores, x.bytes, x.wide, x.tiles, x.convolution, eager] for x, eager, _ in kept
    ]
    return Operators(*np.array(columns, dtype=float).T, np.stack([missed for *_, missed in kept]))


def _missed(events: list[Event]) -> list[np.ndarray]:
    """For each event, the bytes that go to memory, with a cache of each size in ``CACHES``.

    A tensor is in the cache if the bytes touched since its last use, including its own, fit in the cache. Written bytes
    go to memory unless the tensor is used again while it is in the cache.
    """
    missed = [np.zeros(len(CACHES)) for _ in events]
    touched: dict[int, tuple[int, int, bool]] = {}  # by tensor: last time, its event, whether it was a write
    now = 0
    for i, event in enumerate(events):
        for is_write, tensors in ((False, event.reads), (True, event.writes)) if isinstance(event, Operator) else ():
            for number, size in tensors:
                when, last, was_written = touched.get(number, (-(1 << 60), i, False))
                absent = now - when + size > SIZES
                missed[i] += size * absent * (not is_write)
                missed[last] += size * absent * was_written
                now += size
                touched[number] = now, i, is_write
    for number, (_, last, was_written) in touched.items():
        missed[last] += was_written * dict(events[last].writes).get(number, 0)
    return missed


def fuse(events: list[Event]) -> tuple[list[Event], list[bool]]:
    """Fuse operators as a compiler does; return the events, and whether each of them runs uncompiled.

    Consecutive operators that only move bytes become one kernel. It reads the tensors made outside of it, and writes
    those read after it. Operators that prepare or unpack a message run uncompiled.
    """
    last = {number: i for i, event in enumerate(events) if isinstance(event, Operator) for number, _ in event.reads}
    unseen = _around_messages(events)
    fused: list[Event] = []
    eager: list[bool] = []
    start = 0
    while start < len(events):
        end = start
        while end < len(events) and not unseen[end] and _moves(events[end]):
            end += 1
        fused += [_kernel(events[start:end], end, last)] if end - start > 1 else events[start : start + 1]
        eager.append(unseen[start])
        start = max(end, start + 1)
    return fused, eager


def with_norms(events: Iterable[Event]) -> list[Event]:
    """The events with each RMS norm as one kernel."""
    found: list[Event] = []
    for norm, group in groupby(events, lambda event: event.norm if isinstance(event, Operator) else 0):
        own = list(group)
        found += [_kernel(own, 0, {})] if norm else own
    return found


def _moves(event: Event) -> bool:
    return isinstance(event, Operator) and event.kind == MEMORY


def _around_messages(events: list[Event]) -> list[bool]:
    """For each event, whether it runs uncompiled, as it belongs to a message.

    That is within :data:`NEAR` events of the message, with no matrix product in between. If these include attention,
    all events until the next matrix product do: they divide, merge and exchange its results.
    """
    unseen = [False] * len(events)
    for i, event in enumerate(events):
        if not isinstance(event, Message | Wait):
            continue
        for step, end in ((-1, -1), (1, len(events))):
            attends = False
            for j in range(i, end, step):
                kind = getattr(events[j], "kind", None)
                attends |= kind == ATTENTION and step > 0
                if type(events[j]) is tuple or kind == MATMUL or (abs(j - i) >= NEAR and not attends):
                    break
                unseen[j] = True
    return unseen


def _kernel(group: list[Operator], end: int, last: dict[int, int]) -> Operator:
    reads, writes = {}, {}
    for one in group:
        for number, size in one.reads:
            if number not in writes:
                reads[number] = max(size, reads.get(number, 0))
        writes |= dict(one.writes)
    kept = {number: size for number, size in writes.items() if last.get(number, -1) >= end}
    kept = kept or dict(group[-1].writes)
    return Operator(MEMORY, 0.0, sum(one.scores for one in group), False, tuple(reads.items()), tuple(kept.items()))


@dataclass
class Clock:
    """The times at which a rank's host, device, and links finish the work issued so far."""

    machine: Machine
    compiled: bool = False
    host: float = 0.0
    device: float = 0.0
    out: float = 0.0
    into: float = 0.0
    spent: Counter = field(default_factory=Counter)  # device seconds by part
    link: float = 0.0  # seconds of messages, overlapped or not
    due: dict[int, float] = field(default_factory=dict)

    def run(self, program: Program) -> "Clock":
        """Advance the times over a program."""
        pace = _Pace(self.machine, self.compiled, program) if program.operators else None
        for name, seconds in pace.spent.items() if pace else ():
            self.spent[name] += seconds
        for one in program.steps:
            if isinstance(one, Run):
                self._operate(one, pace)
            elif isinstance(one, Message):
                self._send(one)
            elif isinstance(one, Wait):
                self._wait(self.due.pop(one.number, 0.0))
            else:
                self._repeat(one)
        return self

    def _operate(self, run: Run, pace: "_Pace") -> None:
        busy, each = pace.device[run.stop] - pace.device[run.start], pace.host[run.stop] - pace.host[run.start]
        if self.machine.synchronous:
            self.spent[HOST] += each
            self.host = self.device = max(self.host, self.device) + busy + each
            return
        issued = self.host - pace.host[run.start] + pace.latest[run.start] + pace.device[run.stop]
        end = max(self.device + busy, issued)
        self.spent[HOST] += end - self.device - busy
        self.host, self.device = self.host + each, end

    def _send(self, message: Message) -> None:
        self.host += CALLS * self.machine.host_seconds(False)
        seconds = self.machine.link_seconds(message)
        if self.machine.synchronous:  # the CPU itself moves the bytes
            seconds *= message.operation != "recv"
            self.spent[LINKS] += seconds
            self.spent[HOST] += max(0.0, self.host - self.device)
            self.link += seconds
            self.host = self.device = max(self.host, self.device) + seconds
            return
        if message.operation == "recv":
            start = max(self.host, self.device, self.into)
            self.into = start + seconds
        else:
            start = max(self.host, self.device, self.out)
            self.out = start + seconds
        self.link += seconds * (message.operation != "recv")
        self.due[message.number] = start + seconds

    def _wait(self, until: float) -> None:
        self.spent[LINKS] += max(0.0, until - self.device)
        self.device = max(self.device, until)

    def _repeat(self, repeat: Repeat) -> None:
        """Run a block once, and add the same time for each further repetition."""
        before, spent, link = (self.host, self.device, self.out, self.into), self.spent.copy(), self.link
        self.run(repeat.program)
        more = repeat.count - 1
        now = self.host, self.device, self.out, self.into
        self.host, self.device, self.out, self.into = (b + (b - a) * more for a, b in zip(before, now, strict=True))
        for name in self.spent:
            self.spent[name] += (self.spent[name] - spent[name]) * more
        self.link += (self.link - link) * more
        self.spent[HOST] += max(0.0, self.host - self.device)
        self.device = max(self.device, self.host)


class _Pace:
    """How long a program's operators take: cumulative sums, for the device and for the host.

    Attributes:
        latest: by the start of a run, the largest lag of the host's issue of an operator behind the device.
        spent: seconds by kind.
    """

    def __init__(self, machine: Machine, compiled: bool, program: Program) -> None:
        run = program.operators
        seconds = machine.seconds(run)
        each = np.where(run.eager > 0, machine.host_seconds(False), machine.host_seconds(compiled))
        device, host = (np.concatenate([[0.0], np.cumsum(x)]) for x in (seconds, each))
        starts = [one.start for one in program.steps if isinstance(one, Run)]
        behind = np.maximum.reduceat(host[1:] - device[:-1], starts)
        self.latest = dict(zip(starts, behind.tolist(), strict=True))
        self.device, self.host = device.tolist(), host.tolist()
        sums = np.bincount(run.kinds.astype(int), weights=seconds, minlength=len(KINDS))
        self.spent = dict(zip(KINDS, sums.tolist(), strict=True))
