"""The ranks as the HTTP process sees them: started, given one call after the other, ended and started anew."""

import asyncio
import multiprocessing
import time
from argparse import Namespace
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from threading import Thread
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from xfuser.config import InputConfig
from xfuser.serve import elastic
from xfuser.serve.jobs import Failure, Job, calls_of

POLL = 0.2  # seconds between looks at what sends no message
GRACE = 5.0  # seconds for the other ranks to end a call that one has ended with a failure
STARTS = 3  # in a row that fail before the engine gives up; of the first one, a single one
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOLD = ("id", "prompt", "negative_prompt", "seed", "settings", "image", "preview_every")  # of a job, to the ranks
FAILURES = {  # what clients are told of calls that did not end well on their ranks
    "invalid": (400, "{}", "invalid_value"),
    "memory": (400, "too large for the memory of a rank ({}): ask for a smaller size", "out_of_memory"),
    "error": (500, "the pipeline failed: {}", "pipeline_failed"),
}


class RanksDown(Exception):
    """Some rank ended, hangs, or differs from the others: all are started anew."""


class Metrics:
    """What ``/metrics`` tells Prometheus."""

    def __init__(self) -> None:
        own = {"registry": CollectorRegistry()}
        self.registry = own["registry"]
        self.queue = Gauge("xdit_queue_length", "Images that wait", **own)
        self.ready = Gauge("xdit_ready", "1 if the ranks can draw", **own)
        self.latency = Histogram("xdit_latency_seconds", "From acceptance to result", buckets=SECONDS, **own)
        self.steps = Counter("xdit_steps", "Denoising steps of calls", **own)
        self.batches = Histogram("xdit_batch_size", "Images in a call", buckets=(1, 2, 4, 8, 16), **own)
        self.running = Gauge("xdit_running", "Calls that are drawn now", **own)
        self.calls = Counter("xdit_calls", "Calls, by the number of their ranks", ["ranks"], **own)
        self.failures = Counter("xdit_failures", "Requests without a result, by code", ["code"], **own)
        self.restarts = Counter("xdit_restarts", "Starts of the ranks after the first", **own)


@dataclass(eq=False)
class Call:
    """What some ranks draw now, until when as predicted, how each ended it, and when it was last heard of."""

    jobs: list[Job]
    ranks: range
    until: float
    ends: dict[int, tuple[str, Any]] = field(default_factory=dict)
    heard: float = field(default_factory=time.monotonic)


class Engine:
    """Draws the jobs that wait, in the order of their arrival, as long as :meth:`run` does.

    Args:
        launch: starts the ranks as children of this process, which starts no others meanwhile, with a connection for
            each; it returns when they have ended.
        sizes: the numbers of ranks that a call may have; the last one is how many there are.
        inputs: the defaults of requests, by which calls are measured.
        options: with ``max_queue``, the jobs that may wait, and ``hang_timeout``, seconds without a step after which
            the ranks of a call hang.

    Attributes:
        waiting: jobs that are accepted and in no call.
        abilities: what the first rank tells of its pipeline; empty until it is loaded.
        why: why the engine is not ready, empty if it is.
        failed: whether it gave up, as the ranks do not start, or by an error of its own.
    """

    def __init__(self, launch: Callable[..., Any], sizes: list[int], inputs: InputConfig, options: Namespace) -> None:
        self._launch, self._sizes, self._inputs, self._options = launch, sizes, inputs, options
        self._failed_starts = 0
        self._ours: list[Connection] = []  # by rank; the other ends, theirs, are closed here once they are ready
        self._theirs: list[Connection] = []
        self._senders: list[ThreadPoolExecutor] = []  # a thread each, as a rank that is stopped reads nothing
        self._ready: set[int] = set()
        self._calls: list[Call] = []
        self._inbox: asyncio.Queue = asyncio.Queue()  # messages of ranks
        self._measuring: asyncio.Task[elastic.Measured] | None = None
        self._measured: elastic.Measured = {}
        self.waiting: list[Job] = []
        self.abilities: dict[str, Any] = {}
        self.why, self.failed = "the ranks load the pipeline", False
        self.metrics = Metrics()
        self.metrics.queue.set_function(lambda: len(self.waiting))
        self.metrics.ready.set_function(lambda: not self.why)
        self.metrics.running.set_function(lambda: len(self._calls))

    def submit(self, jobs: list[Job]) -> None:
        """Have all of these jobs drawn, or raise a :class:`Failure`."""
        if self.failed:
            raise Failure(503, self.why, "engine_stopped")
        if len(self.waiting) + len(jobs) > self._options.max_queue:
            told = f"{len(self.waiting)} images are waiting, {self._options.max_queue} may: try again later"
            raise Failure(429, told, "rate_limit_exceeded")
        self.waiting += jobs
        self._wake()

    def cancel(self, jobs: list[Job]) -> None:
        """End these jobs within one step; what has ended stays as it is."""
        self.waiting = [job for job in self.waiting if job not in jobs]
        names = {job.id for job in jobs if not job.outcome}
        for call in self._calls:
            if not names.isdisjoint(job.id for job in call.jobs):
                self._send(call.ranks[:1], ("cancel", names))
        for job in jobs:
            job.finish(Failure(409, "this request was cancelled", "cancelled"))

    async def run(self) -> None:
        """Until this task is cancelled: start the ranks, and let them draw until one fails."""
        try:
            while not self.failed:
                await self._start_and_draw()
        except Exception as error:
            self.why, self.failed = f"an error of the server, {error!r}", True
            raise
        finally:
            self.why = f"the engine ended: {self.why or 'the server stops'}"
            if self._measuring:
                self._measuring.cancel()
            jobs = self.waiting + [job for call in self._calls for job in call.jobs]
            self._fail(jobs, Failure(503, self.why, "engine_stopped"))

    def _wake(self, _: Any = None) -> None:
        """There is something to look at."""
        self._inbox.put_nowait((None, "look", None))

    async def _start_and_draw(self) -> None:
        """One life of the ranks."""
        inbox, loop, others = asyncio.Queue(), asyncio.get_running_loop(), multiprocessing.active_children()
        self._inbox, self._ready = inbox, set()
        pipes = [multiprocessing.Pipe() for _ in range(self._sizes[-1])]
        self._ours, self._theirs = map(list, zip(*pipes, strict=True))
        self._senders = [ThreadPoolExecutor(1) for _ in pipes]
        for rank, connection in enumerate(self._ours):
            put = partial(loop.call_soon_threadsafe, inbox.put_nowait)
            Thread(target=pass_on, args=(rank, connection, put), daemon=True).start()
        launcher = loop.run_in_executor(None, self._launch, self._theirs)
        launcher.add_done_callback(lambda _: inbox.put_nowait((None, "ended", None)))
        try:
            while True:
                with suppress(asyncio.TimeoutError):
                    self._hear(*await asyncio.wait_for(inbox.get(), POLL))
                for call in list(self._calls):
                    self._watch(call)
                if len(self._ready) == self._sizes[-1]:
                    self._be_ready()
                    self._begin()
        except RanksDown as down:
            self._settle_down(down)
        finally:
            while not launcher.done():  # also while it starts them
                for process in set(multiprocessing.active_children()).difference(others):
                    process.kill()
                await asyncio.wait([launcher], timeout=POLL)
            for connection, sender in zip(self._theirs, self._senders, strict=True):
                connection.close()
                sender.shutdown(wait=False)

    def _hear(self, rank: int | None, name: str, value: Any) -> None:
        """A message of a rank, or a note of this process."""
        if name == "ended":
            raise RanksDown("a rank ended")
        if name == "ready":
            self._theirs[rank].close()  # so that its end closes it
            self._ready.add(rank)
            self.abilities = value if rank == 0 else self.abilities
        if name not in ("step", "end"):
            return
        call = next((call for call in self._calls if rank in call.ranks), None)
        if call is None:
            raise RanksDown("a rank told of a call that had ended")
        call.heard = time.monotonic()
        if name == "end":
            call.ends[rank] = value
            return
        self.metrics.steps.inc()
        step, previews = value
        for job in call.jobs:
            job.step = step
            if job.id in previews:
                job.preview, job.previews = previews[job.id], job.previews + 1
            job.changed.set()

    def _be_ready(self) -> None:
        """Now that all ranks are; at the first time, when calls have been measured."""
        if not self._measuring:
            measure = elastic.measure(self._draw, self.abilities, self._sizes, self._inputs)
            self._measuring = asyncio.ensure_future(measure)
            self._measuring.add_done_callback(self._wake)
        if self.why and self._measuring.done():
            self._measured, self.why = self._measuring.result(), ""
        self._failed_starts, self.why = 0, self.why and "the ranks measure calls"

    async def _draw(self, job: Job) -> float:
        """Have a job drawn; the seconds that it took."""
        start = time.perf_counter()
        self.submit([job])
        await job.ended()
        return time.perf_counter() - start

    def _begin(self) -> None:
        """Hand out what waits to ranks that draw nothing."""
        ranks = range(self._sizes[-1])
        until = [next((call.until for call in self._calls if rank in call.ranks), 0.0) for rank in ranks]
        if not self.waiting or all(until):
            return
        calls = calls_of(self.waiting, parts=len(ranks) // self._sizes[0])
        predict = partial(elastic.seconds, measured=self._measured)
        for jobs, team, end in elastic.placed(calls, until, predict, self._sizes, time.monotonic()):
            self.waiting = [job for job in self.waiting if job not in jobs]
            self._calls.append(Call(jobs, team, end))
            self.metrics.batches.observe(len(jobs))
            self.metrics.calls.labels(len(team)).inc()
            told = [{name: getattr(job, name) for name in TOLD} for job in jobs]
            self._send(team, ("draw", len(team), told))

    def _send(self, ranks: range, message: Any) -> None:
        """In the order of calls; that a rank has ended is told by its connection's other direction."""
        for rank in ranks:
            self._senders[rank].submit(self._ours[rank].send, message)

    def _watch(self, call: Call) -> None:
        """End the call if all its ranks have, or see whether they hang."""
        failed = [end for end in call.ends.values() if end[0] != "done"]
        alike = len({kind for kind, _ in call.ends.values()}) == 1
        hang = self._options.hang_timeout
        everyone, silence = len(call.ends) == len(call.ranks), time.monotonic() - call.heard
        if everyone and alike:
            self._calls.remove(call)
            self._settle(call, *call.ends[call.ranks[0]])
        elif failed and (everyone or silence > min(GRACE, hang)):
            self._calls.remove(call)
            self._settle(call, *failed[0])
            raise RanksDown("a call ended differently on two ranks")
        elif silence > hang:
            raise RanksDown(f"no step for {hang:g} s")

    def _settle(self, call: Call, kind: str, details: Any) -> None:
        """Hand over the results of a call; or draw it again in smaller ones, or on more ranks; or let it fail."""
        jobs, count = [job for job in call.jobs if not job.outcome], len(call.jobs)
        if kind == "done" and len(details) != count:  # by a pipeline that takes no batches, or draws nothing
            kind, details = "invalid" if count > 1 else "error", f"{len(details)} results instead of {count}"
        most = {"invalid": 1, "memory": count // 2}.get(kind)
        more = [size for size in self._sizes if size > len(call.ranks)]
        if kind == "done":
            for job, result in zip(call.jobs, details, strict=True):
                self.metrics.latency.observe(time.time() - job.arrived)
                job.finish(result)
        elif count > 1 and most:
            self._draw_again(jobs, most=most)
        elif kind == "memory" and more:
            self._draw_again(jobs, ranks={size: call.jobs[0].ranks.get(size, 0.0) for size in more})
        elif jobs:
            status, told, code = FAILURES[kind]
            self._fail(jobs, Failure(status, told.format(details), code))

    def _settle_down(self, down: RanksDown) -> None:
        """What the ranks drew fails, or is drawn again if its client asked for that."""
        self._failed_starts += bool(self.why)
        self.why = f"the ranks start again: {down}"
        jobs = [job for call in self._calls for job in call.jobs if not job.outcome]
        lost = Failure(503, f"the ranks ended while they drew this: {down}", "engine_restarted")
        self._fail([job for job in jobs if not job.retry], lost)
        self._draw_again([job for job in jobs if job.retry], retry=False)
        self._calls = []
        self.failed = self._failed_starts >= (STARTS if self.abilities else 1)
        self.metrics.restarts.inc()

    def _draw_again(self, jobs: list[Job], **changes: Any) -> None:
        """Put these jobs ahead of all that wait, with other values."""
        for job in jobs:
            vars(job).update(changes, step=0)
        self.waiting[:0] = jobs

    def _fail(self, jobs: list[Job], failure: Failure) -> None:
        for job in jobs:
            self.metrics.failures.labels(failure.code).inc()
            job.finish(failure)


def pass_on(rank: int, connection: Connection, put: Callable[[tuple], Any]) -> None:
    """What a rank tells, until it has ended; in a thread, as it may stop in the middle of a message."""
    with connection:
        try:
            while True:
                put((rank, *connection.recv()))
        except (EOFError, OSError):
            put((rank, "ended", None))
