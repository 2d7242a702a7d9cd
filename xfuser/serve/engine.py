"""The ranks as the HTTP process sees them: started, given one call after the other, ended and started anew."""

import asyncio
import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import psutil
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

from xfuser.serve import elastic
from xfuser.serve.jobs import Failure, Job, JobQueue

POLL = 0.2  # seconds between looks at what sends no message
GRACE = 5.0  # seconds for the other ranks to end a call that one has ended with a failure
STARTS = 3  # in a row that fail before the engine gives up; of the first one, a single one
SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
TOLD = ("id", "prompt", "negative_prompt", "seed", "settings", "image", "preview_every")  # of a job, to the ranks


class RanksDown(Exception):
    """Some rank ended, hangs, or differs from the others: all are started anew."""


class Metrics:
    """What ``/metrics`` tells Prometheus."""

    def __init__(self) -> None:
        own = {"registry": CollectorRegistry()}
        self.registry = own["registry"]
        self.queue = Gauge("xdit_queue_length", "Pictures that wait", **own)
        self.ready = Gauge("xdit_ready", "1 if the ranks can draw", **own)
        self.latency = Histogram("xdit_latency_seconds", "From acceptance to result", buckets=SECONDS, **own)
        self.steps = Counter("xdit_steps", "Denoising steps of calls", **own)
        self.batches = Histogram("xdit_batch_size", "Pictures in a call", buckets=(1, 2, 4, 8, 16), **own)
        self.running = Gauge("xdit_running", "Calls that are drawn now", **own)
        self.calls = Counter("xdit_calls", "Calls, by the number of their ranks", ["ranks"], **own)
        self.failures = Counter("xdit_failures", "Requests without a result, by code", ["code"], **own)
        self.restarts = Counter("xdit_restarts", "Starts of the ranks after the first", **own)


@dataclass(eq=False)
class Call:
    """What some ranks draw now, how each of them ended it, and when something was last heard of it.

    ``until`` is when it is predicted to end; ``told`` are the jobs that its first rank knows to be cancelled.
    """

    jobs: list[Job]
    ranks: range
    until: float
    ends: dict[int, tuple[str, Any]] = field(default_factory=dict)
    heard: float = field(default_factory=time.monotonic)
    told: set[str] = field(default_factory=set)


class Engine:
    """Draws the jobs of a queue on ranks, as long as :meth:`run` does.

    Args:
        launch: starts the ranks with an address in their arguments, and returns when they have ended.
        ranks: how many there are; ``sizes``: of them, a call may have.
        hang: seconds without a step, of a running call, after which the ranks are taken to hang.

    Attributes:
        abilities: what the first rank tells of its pipeline; None until the ranks are ready for the first time.
        why: why the engine is not ready, empty if it is.
        failed: whether it gave up, as the ranks do not start, or by an error of its own.
    """

    def __init__(
        self, launch: Callable[[str], Any], ranks: int, sizes: list[int], queue: JobQueue, metrics: Metrics, hang: float
    ) -> None:
        self._launch, self._ranks, self._sizes, self._hang = launch, ranks, sizes, hang
        self._queue, self._metrics = queue, metrics
        self._folder = tempfile.mkdtemp(prefix="xdit-")  # mode 700: only this user's processes connect
        self.address = os.path.join(self._folder, "engine")
        self._connections: dict[int, Connection] = {}  # of the ranks that are ready
        self._calls: list[Call] = []
        self._inbox: asyncio.Queue = asyncio.Queue()  # ranks and their messages
        self._failed_starts = 0
        self.abilities: dict[str, Any] | None = None
        self.why, self.failed = "the ranks load the pipeline", False
        metrics.queue.set_function(lambda: len(queue.jobs))
        metrics.ready.set_function(lambda: not self.why)
        metrics.running.set_function(lambda: len(self._calls))

    def submit(self, jobs: list[Job]) -> None:
        """Have these jobs drawn, or raise a :class:`Failure`."""
        self._queue.put(jobs)
        self._inbox.put_nowait((None, "look", None))

    def cancel(self, jobs: list[Job]) -> None:
        """End these jobs within one step; what has ended stays as it is."""
        self._queue.remove(jobs)
        for job in jobs:
            job.finish(Failure(409, "this request was cancelled", "cancelled"))
        self._inbox.put_nowait((None, "look", None))

    async def run(self) -> None:
        """Until this task is cancelled: start the ranks, and let them draw until one fails."""
        try:
            while not self.failed:
                await self._start_and_draw()
        except asyncio.CancelledError:
            self.why = "the server stops"
            raise
        except Exception as error:
            self.why, self.failed = f"an error of the server, {error!r}", True
            raise
        finally:
            self.why = f"the engine ended: {self.why}"
            jobs = self._queue.jobs + [job for call in self._calls for job in call.jobs]
            self._fail(jobs, Failure(503, self.why, "engine_stopped"))
            self._kill()
            shutil.rmtree(self._folder)

    async def _start_and_draw(self) -> None:
        """One life of the ranks."""
        inbox = self._inbox = asyncio.Queue()
        self._connections = {}
        with socket.socket(socket.AF_UNIX) as listener:
            listener.bind(self.address)
            listener.listen(self._ranks)
            listener.setblocking(False)
            launcher = asyncio.ensure_future(asyncio.to_thread(self._launch, self.address))
            launcher.add_done_callback(lambda _: inbox.put_nowait((None, "ended", None)))
            helpers = [asyncio.ensure_future(one) for one in (self._accept(listener), self._tick())]
            try:
                while True:
                    self._hear(*await inbox.get())
                    for call in list(self._calls):
                        self._watch(call)
                    self._begin()
            except RanksDown as down:
                self._settle_down(down)
            finally:
                os.unlink(self.address)
                for helper in helpers:
                    helper.cancel()
                while not launcher.done():  # also while it starts them
                    self._kill()
                    await asyncio.wait([launcher], timeout=POLL)

    async def _accept(self, listener: socket.socket) -> None:
        """Read each rank that connects in a thread, as it may stop in the middle of a message."""
        loop = asyncio.get_running_loop()
        while True:
            one, _ = await loop.sock_accept(listener)
            one.setblocking(True)
            put = partial(loop.call_soon_threadsafe, self._inbox.put_nowait)
            threading.Thread(target=pass_on, args=(Connection(one.detach()), put), daemon=True).start()

    async def _tick(self) -> None:
        """Have the clock and what waits looked at now and then."""
        while True:
            await asyncio.sleep(POLL)
            self._inbox.put_nowait((None, "look", None))

    def _hear(self, connection: Connection | None, name: str, value: Any) -> None:
        """A message of a rank, or a note of this process."""
        rank = next((rank for rank, one in self._connections.items() if one is connection), None)
        call = next((call for call in self._calls if rank in call.ranks), None)
        if name == "ended" or (name in ("step", "end") and call is None):
            raise RanksDown("a rank ended" if name == "ended" else "a rank told of a call that had ended")
        if name == "ready":
            rank, abilities = value
            self._connections[rank] = connection
            self.abilities = abilities if rank == 0 else self.abilities
            if len(self._connections) == self._ranks:
                self._failed_starts, self.why = 0, ""
        if call is None:
            return
        call.heard = time.monotonic()
        if name == "end":
            call.ends[rank] = value
        elif name == "step":
            step, previews = value
            self._metrics.steps.inc()
            for job in call.jobs:
                job.step = step
                if job.id in previews:
                    job.preview, job.previews = previews[job.id], job.previews + 1
                job.changed.set()

    def _begin(self) -> None:
        """Hand out what waits to ranks that draw nothing."""
        until = [next((call.until for call in self._calls if rank in call.ranks), 0.0) for rank in range(self._ranks)]
        if self.why or not self._queue.jobs or all(until):
            return
        calls = self._queue.calls(parts=self._ranks // self._sizes[0])
        predict = partial(elastic.seconds, measured=self.abilities["seconds"])
        for jobs, ranks, end in elastic.placed(calls, until, predict, self._sizes, time.monotonic()):
            self._queue.remove(jobs)
            self._calls.append(Call(jobs, ranks, end))
            self._metrics.batches.observe(len(jobs))
            self._metrics.calls.labels(len(ranks)).inc()
            told = [{name: getattr(job, name) for name in TOLD} for job in jobs]
            self._send(ranks, ("draw", len(ranks), told))

    def _send(self, ranks: range, message: Any) -> None:
        for rank in ranks:
            try:
                self._connections[rank].send(message)
            except OSError as error:
                raise RanksDown("a rank ended") from error

    def _watch(self, call: Call) -> None:
        """End the call if all its ranks have, tell them of cancelled jobs, see whether they hang."""
        failed = [end for end in call.ends.values() if end[0] != "done"]
        alike = len({kind for kind, _ in call.ends.values()}) == 1
        everyone, silence = len(call.ends) == len(call.ranks), time.monotonic() - call.heard
        if everyone and alike:
            self._calls.remove(call)
            self._settle(call, *call.ends[call.ranks[0]])
        elif failed and (everyone or silence > GRACE):
            self._calls.remove(call)
            self._settle(call, *failed[0])
            raise RanksDown("a call ended differently on two ranks")
        elif silence > self._hang:
            raise RanksDown(f"no step for {self._hang:g} s")
        elif cancelled := {job.id for job in call.jobs if job.outcome} - call.told:
            call.told |= cancelled
            self._send(call.ranks[:1], ("cancel", cancelled))

    def _settle(self, call: Call, kind: str, details: Any) -> None:
        """Hand over the results of a call; or draw it again in smaller ones, or on more ranks; or let it fail."""
        jobs, count = [job for job in call.jobs if not job.outcome], len(call.jobs)
        more = [size for size in self._sizes if size > len(call.ranks)] if kind == "memory" else []
        smaller = {"invalid": 1, "memory": count // 2}.get(kind, 0)
        if kind == "done":
            for job, result in zip(call.jobs, details, strict=True):
                self._metrics.latency.observe(time.monotonic() - job.arrived)
                job.finish(result)
        elif (smaller and count > 1) or more:
            for job in jobs:
                if count > 1:
                    job.most = smaller
                else:
                    job.ranks = {size: job.ranks.get(size, 0.0) for size in more}
            self._queue.jobs[:0] = jobs
        else:
            self._fail(jobs, failure_of(kind, details))

    def _settle_down(self, down: RanksDown) -> None:
        """What the ranks drew fails, or is drawn again if its client asked for that."""
        self._failed_starts += bool(self.why)
        self.why = f"the ranks start again: {down}"
        jobs = [job for call in self._calls for job in call.jobs if not job.outcome]
        again = [job for job in jobs if job.retry]
        for job in again:
            job.retry, job.step = False, 0
        self._queue.jobs[:0] = again
        self._fail(
            [job for job in jobs if job not in again],
            Failure(503, f"the ranks ended while they drew this: {down}", "engine_restarted"),
        )
        self._calls = []
        self.failed = self._failed_starts >= (STARTS if self.abilities else 1)
        self._metrics.restarts.inc()

    def _fail(self, jobs: list[Job], failure: Failure) -> None:
        for job in jobs:
            self._metrics.failures.labels(failure.code).inc()
            job.finish(failure)

    def _kill(self) -> None:
        """End the ranks at once, also those that have not connected yet."""
        for process in psutil.Process().children():
            try:
                if self.address in process.cmdline():
                    process.kill()
            except psutil.Error:  # it has just ended
                continue


def pass_on(rank: Connection, put: Callable[[tuple], Any]) -> None:
    """What a rank tells, until it has ended."""
    try:
        while True:
            put((rank, *rank.recv()))
    except (EOFError, OSError):
        put((rank, "ended", None))


def failure_of(kind: str, message: str) -> Failure:
    """What a client is told of a call that ended so on its ranks."""
    if kind == "invalid":
        return Failure(400, message, "invalid_value")
    if kind == "memory":
        return Failure(400, f"too large for the memory of a rank ({message}): ask for a smaller size", "out_of_memory")
    return Failure(500, f"the pipeline failed: {message}", "pipeline_failed")
