"""Runs the ranks for the HTTP process: starts them, sends them calls, and restarts them after a failure."""

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

POLL = 0.2  # seconds between checks
GRACE = 5.0  # seconds for the other ranks to end a call that failed on one rank
STARTS = 3  # consecutive failed starts until the engine gives up; 1 if the ranks were never ready
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOLD = ("id", "prompt", "negative_prompt", "seed", "settings", "image", "preview_every")  # job fields sent to ranks
FAILURES = {  # responses to clients for calls that failed on their ranks
    "invalid": (400, "{}", "invalid_value"),
    "memory": (400, "too large for the memory of a rank ({}): ask for a smaller size", "out_of_memory"),
    "error": (500, "the pipeline failed: {}", "pipeline_failed"),
}


class RanksDown(Exception):
    """A rank ended, hangs, or differs from the others: all ranks must be restarted."""


class Metrics:
    """The Prometheus metrics of ``/metrics``."""

    def __init__(self) -> None:
        own = {"registry": CollectorRegistry()}
        self.registry = own["registry"]
        self.queue = Gauge("xdit_queue_length", "Waiting images", **own)
        self.ready = Gauge("xdit_ready", "1 if the ranks are ready", **own)
        self.latency = Histogram("xdit_latency_seconds", "Seconds from acceptance to result", buckets=SECONDS, **own)
        self.steps = Counter("xdit_steps", "Denoising steps of calls", **own)
        self.batches = Histogram("xdit_batch_size", "Images in a call", buckets=(1, 2, 4, 8, 16), **own)
        self.running = Gauge("xdit_running", "Running calls", **own)
        self.calls = Counter("xdit_calls", "Calls by number of ranks", ["ranks"], **own)
        self.failures = Counter("xdit_failures", "Requests without a result, by code", ["code"], **own)
        self.restarts = Counter("xdit_restarts", "Restarts of the ranks", **own)


@dataclass(eq=False)
class Call:
    """A running call: its ranks, its predicted end, how each rank ended it, and the time of its last message."""

    jobs: list[Job]
    ranks: range
    until: float
    ends: dict[int, tuple[str, Any]] = field(default_factory=dict)
    heard: float = field(default_factory=time.monotonic)


class Engine:
    """Runs the waiting jobs in the order of their arrival, while :meth:`run` runs.

    Args:
        launch: starts the ranks as children of this process, with a connection for each, and returns when they have
            ended. This process must not start other children meanwhile.
        sizes: the numbers of ranks on which a call may run; the last one is the world size.
        inputs: the defaults of requests, with which calls are measured.
        options: ``max_queue``, the maximum number of waiting jobs, and ``hang_timeout``, the seconds without a step
            after which the ranks of a call count as hung.

    Attributes:
        waiting: accepted jobs that are in no call yet.
        abilities: the first rank's report on its pipeline; empty until it is loaded.
        why: why the engine is not ready; empty if it is ready.
        failed: whether the engine gave up, because the ranks do not start or because of an internal error.
    """

    def __init__(self, launch: Callable[..., Any], sizes: list[int], inputs: InputConfig, options: Namespace) -> None:
        self._launch, self._sizes, self._inputs, self._options = launch, sizes, inputs, options
        self._failed_starts = 0
        self._ours: list[Connection] = []  # by rank; the ranks' ends (_theirs) are closed here once ready
        self._theirs: list[Connection] = []
        self._senders: list[ThreadPoolExecutor] = []  # one thread each, as a stopped rank does not read
        self._ready: set[int] = set()
        self._calls: list[Call] = []
        self._inbox: asyncio.Queue = asyncio.Queue()  # messages from ranks
        self._measuring: asyncio.Task[elastic.Measured] | None = None
        self._measured: elastic.Measured = {}
        self.waiting: list[Job] = []
        self.abilities: dict[str, Any] = {}
        self.why, self.failed = "the ranks are loading the pipeline", False
        self.metrics = Metrics()
        self.metrics.queue.set_function(lambda: len(self.waiting))
        self.metrics.ready.set_function(lambda: not self.why)
        self.metrics.running.set_function(lambda: len(self._calls))

    def submit(self, jobs: list[Job]) -> None:
        """Queue all of these jobs, or raise a :class:`Failure`."""
        if self.failed:
            raise Failure(503, self.why, "engine_stopped")
        if len(self.waiting) + len(jobs) > self._options.max_queue:
            told = f"{len(self.waiting)} images wait, at most {self._options.max_queue} may wait: try again later"
            raise Failure(429, told, "rate_limit_exceeded")
        self.waiting += jobs
        self._wake()

    def cancel(self, jobs: list[Job]) -> None:
        """Cancel these jobs within one step; jobs that have ended are not changed."""
        self.waiting = [job for job in self.waiting if job not in jobs]
        names = {job.id for job in jobs if not job.outcome}
        for call in self._calls:
            if not names.isdisjoint(job.id for job in call.jobs):
                self._send(call.ranks[:1], ("cancel", names))
        for job in jobs:
            job.finish(Failure(409, "this request was cancelled", "cancelled"))

    async def run(self) -> None:
        """Start the ranks, and restart them after failures, until this task is cancelled or the starts fail."""
        try:
            while not self.failed:
                await self._start_and_draw()
        except Exception as error:
            self.why, self.failed = f"internal server error: {error!r}", True
            raise
        finally:
            self.why = f"the engine ended: {self.why or 'the server stops'}"
            if self._measuring:
                self._measuring.cancel()
            jobs = self.waiting + [job for call in self._calls for job in call.jobs]
            self._fail(jobs, Failure(503, self.why, "engine_stopped"))

    def _wake(self, _: Any = None) -> None:
        """Wake the loop, which then checks for work."""
        self._inbox.put_nowait((None, "look", None))

    async def _start_and_draw(self) -> None:
        """Start the ranks, run calls until one rank fails, and end the ranks."""
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
            while not launcher.done():  # also if the launcher is still starting them
                for process in set(multiprocessing.active_children()).difference(others):
                    process.kill()
                await asyncio.wait([launcher], timeout=POLL)
            for connection, sender in zip(self._theirs, self._senders, strict=True):
                connection.close()
                sender.shutdown(wait=False)

    def _hear(self, rank: int | None, name: str, value: Any) -> None:
        """Handle a message from a rank or from this process."""
        if name == "ended":
            raise RanksDown("a rank ended")
        if name == "ready":
            self._theirs[rank].close()  # so that the connection closes when the rank ends
            self._ready.add(rank)
            self.abilities = value if rank == 0 else self.abilities
        if name not in ("step", "end"):
            return
        call = next((call for call in self._calls if rank in call.ranks), None)
        if call is None:
            raise RanksDown("a rank reported a call that had already ended")
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
        """Become ready once all ranks are; the first time, only after calls have been measured."""
        if not self._measuring:
            measure = elastic.measure(self._draw, self.abilities, self._sizes, self._inputs)
            self._measuring = asyncio.ensure_future(measure)
            self._measuring.add_done_callback(self._wake)
        if self.why and self._measuring.done():
            self._measured, self.why = self._measuring.result(), ""
        self._failed_starts, self.why = 0, self.why and "the ranks are measuring calls"

    async def _draw(self, job: Job) -> float:
        """Run a job, and return the seconds that it took."""
        start = time.perf_counter()
        self.submit([job])
        await job.ended()
        return time.perf_counter() - start

    def _begin(self) -> None:
        """Start waiting calls on idle ranks."""
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
        """Send a message to each rank, in order. Errors are ignored: reading the connection shows that a rank ended."""
        for rank in ranks:
            self._senders[rank].submit(self._ours[rank].send, message)

    def _watch(self, call: Call) -> None:
        """End the call if all its ranks have ended it, and check whether they hang."""
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
        """Deliver the results of a call, or retry it as smaller calls or on more ranks, or fail its jobs."""
        jobs, count = [job for job in call.jobs if not job.outcome], len(call.jobs)
        if kind == "done" and len(details) != count:  # the pipeline does not support batches, or returned nothing
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
        """Fail the running jobs, or retry those whose client asked for it."""
        self._failed_starts += bool(self.why)
        self.why = f"the ranks are restarting: {down}"
        jobs = [job for call in self._calls for job in call.jobs if not job.outcome]
        lost = Failure(503, f"the ranks failed while this was running: {down}", "engine_restarted")
        self._fail([job for job in jobs if not job.retry], lost)
        self._draw_again([job for job in jobs if job.retry], retry=False)
        self._calls = []
        self.failed = self._failed_starts >= (STARTS if self.abilities else 1)
        self.metrics.restarts.inc()

    def _draw_again(self, jobs: list[Job], **changes: Any) -> None:
        """Put these jobs, with changed values, before all waiting ones."""
        for job in jobs:
            vars(job).update(changes, step=0)
        self.waiting[:0] = jobs

    def _fail(self, jobs: list[Job], failure: Failure) -> None:
        for job in jobs:
            self.metrics.failures.labels(failure.code).inc()
            job.finish(failure)


def pass_on(rank: int, connection: Connection, put: Callable[[tuple], Any]) -> None:
    """Forward a rank's messages until it has ended; runs in a thread, as a rank may stop within a message."""
    with connection:
        try:
            while True:
                put((rank, *connection.recv()))
        except (EOFError, OSError):
            put((rank, "ended", None))
