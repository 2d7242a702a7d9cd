"""The ranks as the HTTP process sees them: started, given one batch after the other, ended and started anew."""

import os
import shutil
import socket
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from typing import Any

import psutil

from xfuser.serve.jobs import Failure, Job, JobQueue
from xfuser.serve.metrics import Metrics

POLL = 0.2  # seconds between looks at what sends no message
GRACE = 5.0  # seconds for the other ranks to end a batch that one has ended with a failure
STARTS = 3  # in a row that fail before the engine gives up; of the first one, a single one


class RanksDown(Exception):
    """Some rank ended, hangs, or differs from the others: all are started anew."""


@dataclass
class Batch:
    """What the ranks draw now, how each of them ended it, and when something was last heard of it."""

    jobs: list[Job]
    ends: dict[Connection, tuple[str, Any]] = field(default_factory=dict)
    heard: float = field(default_factory=time.monotonic)
    told_cancelled: set[str] = field(default_factory=set)


class Engine(threading.Thread):
    """Draws the jobs of a queue on ranks, until :meth:`stop`.

    Args:
        launch: starts the ranks with an address in their arguments, and returns when they have ended.
        ranks: how many there are.
        hang: seconds without a step, of a running batch, after which the ranks are taken to hang.

    Attributes:
        abilities: what the first rank tells of its pipeline; None until the ranks are ready for the first time.
        why: why the engine is not ready, empty if it is.
        dead: whether it gave up, as the ranks do not start; ``when_dead`` is called behind the end.
    """

    def __init__(
        self, launch: Callable[[str], Any], ranks: int, queue: JobQueue, metrics: Metrics, hang: float
    ) -> None:
        super().__init__(name="xdit-engine", daemon=True)
        self._launch, self._ranks, self._queue, self._metrics, self._hang = launch, ranks, queue, metrics, hang
        self._folder = tempfile.mkdtemp(prefix="xdit-")  # mode 700: only this user's processes connect
        self.address = os.path.join(self._folder, "engine")
        self._awake, self._waker = Pipe(duplex=False)
        self._stopping, self._failed_starts = False, 0
        self._connections: dict[Connection, int] = {}  # with the rank of each
        self._batch: Batch | None = None
        self.abilities: dict[str, Any] | None = None
        self.why, self.dead = "the ranks load the pipeline", False
        self.when_dead: Callable[[], Any] = lambda: None
        queue.notify = self.wake

    def wake(self) -> None:
        """Have the thread look at the queue and at cancelled jobs now."""
        self._waker.send_bytes(b".")

    def stop(self) -> None:
        """End the ranks and the thread; what is not drawn fails."""
        self._stopping = True
        self.wake()
        self.join()

    def run(self) -> None:
        """Until it is stopped: start the ranks, and let them draw until one fails."""
        try:
            self._run()
        finally:  # also behind an error of this thread
            self.dead = not self._stopping
            self.why = self.why or "an error of the server, which its log tells"
            for process in self._processes():
                process.kill()
            for job in self._queue.take_all() + (self._batch.jobs if self._batch else []):
                self._fail(job, Failure(503, f"the server stops: {self.why}", "engine_stopped"))
            shutil.rmtree(self._folder)
            self.when_dead()

    def _run(self) -> None:
        while not self._stopping and not self.dead:
            launcher = threading.Thread(target=self._launch, args=(self.address,), daemon=True)
            try:
                with socket.socket(socket.AF_UNIX) as listener:
                    listener.bind(self.address)
                    listener.listen(self._ranks)
                    launcher.start()
                    self._accept(listener, launcher)
                    self._serve()
            except RanksDown as down:
                self._end(down, launcher)

    def _accept(self, listener: socket.socket, launcher: threading.Thread) -> None:
        """Wait until all ranks have told that they are ready."""
        silent: list[Connection] = []
        connected = self._connections = {}
        while len(connected) < self._ranks:
            for one in wait([listener, *silent, self._awake], POLL):
                if one is listener:
                    silent.append(Connection(listener.accept()[0].detach()))
                elif one is self._awake:
                    self._awake.recv_bytes()
                else:
                    connected[one], abilities = self._receive(one)
                    silent.remove(one)
                    self.abilities = abilities if connected[one] == 0 else self.abilities
            if self._stopping or not launcher.is_alive():
                raise RanksDown("a rank ended while it loaded the pipeline")
        self._failed_starts, self.why = 0, ""
        self._metrics.ready.set(1)

    def _serve(self) -> None:
        """Draw what is in the queue, until a rank fails or the engine is stopped."""
        while True:
            if self._batch is None:
                self._begin()
            for one in wait([*self._connections, self._awake], POLL if self._batch else None):
                if one is self._awake:
                    self._awake.recv_bytes()
                else:
                    self._hear(one, *self._receive(one))
            if self._stopping:
                raise RanksDown("it was told to")
            if self._batch:
                self._watch(self._batch)

    def _begin(self) -> None:
        jobs = self._queue.take()
        if not jobs:
            return
        self._batch = Batch(jobs)
        self._metrics.batches.observe(len(jobs))
        names = ("id", "prompt", "negative_prompt", "seed", "settings", "image", "preview_every")
        told = [{name: getattr(job, name) for name in names} for job in jobs]
        self._send(("draw", told), list(self._connections))

    def _hear(self, rank: Connection, name: str, value: Any, details: Any) -> None:
        """A message of a rank about the batch."""
        batch = self._batch
        if batch is None:
            raise RanksDown("a rank told of a batch that had ended")
        batch.heard = time.monotonic()
        if name == "end":
            batch.ends[rank] = value, details
            return
        self._metrics.steps.inc()
        for job in batch.jobs:
            job.step = value
            if job.id in details:
                job.preview, job.previews = details[job.id], job.previews + 1

    def _watch(self, batch: Batch) -> None:
        """End the batch if all ranks have, tell them of cancelled jobs, see whether they hang."""
        kinds = {kind for kind, _ in batch.ends.values()}
        silence = time.monotonic() - batch.heard
        if len(batch.ends) == self._ranks and len(kinds) == 1:
            self._batch = None
            self._settle(batch, *batch.ends[self._first()])
        elif kinds - {"done"} and (len(batch.ends) == self._ranks or silence > GRACE):
            self._batch = None
            self._settle(batch, *next(end for end in batch.ends.values() if end[0] != "done"))
            raise RanksDown("a batch ended differently on two ranks")
        elif silence > self._hang:
            raise RanksDown(f"no step for {self._hang:g} s")
        else:
            cancelled = {job.id for job in batch.jobs if job.cancelled}
            if cancelled - batch.told_cancelled:
                batch.told_cancelled = cancelled
                self._send(("cancel", cancelled), [self._first()])

    def _settle(self, batch: Batch, kind: str, details: Any) -> None:
        """Hand over the results of a batch, or draw it again in smaller ones, or let it fail."""
        jobs = [job for job in batch.jobs if not job.cancelled]
        smaller = {"invalid": 1, "memory": len(batch.jobs) // 2}.get(kind, 0)
        if kind == "done":
            for job, result in zip(batch.jobs, details, strict=True):
                self._metrics.latency.observe(time.monotonic() - job.arrived)
                job.finish(result)
        elif smaller and len(batch.jobs) > 1:
            for job in jobs:
                job.most = smaller
            self._queue.put_back(jobs)
        else:
            for job in jobs:
                self._fail(job, failure_of(kind, details))

    def _end(self, down: RanksDown, launcher: threading.Thread) -> None:
        """End all ranks at once; what they drew fails, or is drawn again if its client asked for that."""
        starting = bool(self.why)
        self.why = f"the ranks start again: {down}"
        self._metrics.ready.set(0)
        while launcher.is_alive():  # also while it starts them
            for process in self._processes():
                process.kill()
            launcher.join(POLL)
        for connection in self._connections:
            connection.close()
        os.unlink(self.address)
        self._connections, batch, self._batch = {}, self._batch, None
        jobs = [job for job in batch.jobs if not job.cancelled] if batch else []
        again = [job for job in jobs if job.retry and not self._stopping]
        for job in again:
            job.retry, job.step = False, 0
        self._queue.put_back(again)
        for job in jobs:
            if job not in again:
                self._fail(job, Failure(503, f"the ranks ended while they drew this: {down}", "engine_restarted"))
        self._failed_starts += starting
        self.dead = self._failed_starts >= (STARTS if self.abilities else 1)
        if not self._stopping:
            self._metrics.restarts.inc()

    def _fail(self, job: Job, failure: Failure) -> None:
        self._metrics.failures.labels(failure.code).inc()
        job.finish(failure)

    def _first(self) -> Connection:
        return next(connection for connection, rank in self._connections.items() if rank == 0)

    def _send(self, message: Any, ranks: list[Connection]) -> None:
        try:
            for rank in ranks:
                rank.send(message)
        except OSError as error:
            raise RanksDown("a rank ended") from error

    @staticmethod
    def _receive(rank: Connection) -> Any:
        try:
            return rank.recv()
        except (EOFError, OSError) as error:
            raise RanksDown("a rank ended") from error

    def _processes(self) -> list[psutil.Process]:
        """The ranks, also those that have not connected yet."""
        found = []
        for process in psutil.Process().children():
            try:
                if self.address in process.cmdline():
                    found.append(process)
            except psutil.Error:  # it has just ended
                continue
        return found


def failure_of(kind: str, message: str) -> Failure:
    """What a client is told of a batch that ended so on its ranks."""
    if kind == "invalid":
        return Failure(400, message, "invalid_value")
    if kind == "memory":
        return Failure(400, f"too large for the memory of a rank ({message}): ask for a smaller size", "out_of_memory")
    return Failure(500, f"the pipeline failed: {message}", "pipeline_failed")
