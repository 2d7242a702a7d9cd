"""One job a picture or video; the queue of those that are accepted, and which of them are drawn together."""

import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any


class Failure(Exception):
    """Why a request has no result, with the HTTP status and OpenAI's ``code`` and ``param`` of its error."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param


@dataclass(eq=False)
class Job:
    """One picture or video.

    Attributes:
        settings: what all jobs of a batch have in common: fields of ``InputConfig``.
        image: an encoded picture to start from; such jobs are drawn alone.
        preview_every: steps from one preview to the next, 0 for none.
        retry: whether it is drawn once more if the ranks end while they draw it.
        most: the largest batch that it may be drawn in.
        future: the encoded picture or video, or a :class:`Failure`.
        cancelled: nobody waits for it any more; its future then fails.
        step: steps that are done; ``preview``: the last one, as a PNG, and ``previews`` counts them.
    """

    prompt: str
    negative_prompt: str
    seed: int
    settings: dict[str, Any]
    image: bytes | None = None
    preview_every: int = 0
    retry: bool = False
    most: int = 1
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    arrived: float = field(default_factory=time.monotonic)
    created: int = field(default_factory=lambda: int(time.time()))
    future: "Future[bytes]" = field(default_factory=Future)
    cancelled: bool = False
    step: int = 0
    preview: bytes | None = None
    previews: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def goes_with(self, other: "Job") -> bool:
        """Whether one call can draw both, each as it would be alone."""
        same = self.settings == other.settings and bool(self.negative_prompt) == bool(other.negative_prompt)
        return same and self.image is other.image is None

    def finish(self, result: bytes | Failure) -> None:
        """Hand over the result, unless there is one already, as of a job that was cancelled."""
        with self._lock:
            if self.future.done():
                return
            if isinstance(result, Failure):
                self.future.set_exception(result)
            else:
                self.future.set_result(result)


class JobQueue:
    """Accepted jobs in the order of their arrival, for threads.

    The job that has waited longest is always in the next batch, whatever its shape: no job waits for more batches than
    there were jobs ahead of it.

    Args:
        capacity: jobs that may wait.
    """

    def __init__(self, capacity: int) -> None:
        self._capacity, self._jobs, self._lock = capacity, [], threading.Lock()
        self.notify: Callable[[], None] = lambda: None

    def __len__(self) -> int:
        return len(self._jobs)

    def put(self, jobs: list[Job]) -> None:
        """Accept all of these jobs, or raise a :class:`Failure`."""
        with self._lock:
            if len(self._jobs) + len(jobs) > self._capacity:
                told = f"{len(self._jobs)} pictures are waiting, {self._capacity} may: try again later"
                raise Failure(429, told, "rate_limit_exceeded")
            self._jobs += jobs
        self.notify()

    def cancel(self, job: Job) -> None:
        """End a job within one step, if it has no result yet."""
        job.cancelled = True
        with self._lock:
            self._jobs = [one for one in self._jobs if one is not job]
        job.finish(Failure(409, "this request was cancelled", "cancelled"))
        self.notify()

    def put_back(self, jobs: list[Job]) -> None:
        """Jobs that were taken and are to be drawn again, ahead of all others."""
        with self._lock:
            self._jobs[:0] = jobs

    def take_all(self) -> list[Job]:
        """All that wait."""
        with self._lock:
            jobs, self._jobs = self._jobs, []
            return jobs

    def take(self) -> list[Job]:
        """The oldest job and those that can be drawn with it; empty if there is none. Cancelled jobs are dropped."""
        with self._lock:
            waiting = [job for job in self._jobs if not job.cancelled]
            batch: list[Job] = []
            for job in waiting:
                together = not batch or job.goes_with(batch[0])
                if together and len(batch) < min(one.most for one in (*batch, job)):
                    batch.append(job)
            self._jobs = [job for job in waiting if job not in batch]
            return batch
