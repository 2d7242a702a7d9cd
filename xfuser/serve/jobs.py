"""One job per image or video, and the grouping of jobs into calls."""

import asyncio
import time
import uuid
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import Any


class Failure(Exception):
    """Why a request has no result, with the HTTP status and OpenAI's ``code`` and ``param`` of its error."""

    def __init__(self, status: int, message: str, code: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status, self.code, self.param = status, code, param

    def body(self) -> dict[str, Any]:
        """The response body, in the shape of OpenAI's errors."""
        kind = "invalid_request_error" if self.status < 429 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(eq=False)
class Job:
    """One image or video.

    Attributes:
        settings: fields of ``InputConfig``, equal for all jobs of a call.
        image: an encoded image to start from; such a job gets its own call.
        preview_every: steps between previews; 0 for no previews.
        retry: whether to run the job once more if the ranks fail while running it.
        most: maximum number of images in its call.
        ranks: the allowed numbers of ranks, with the seconds that the planner predicts; 0 without a prediction.
        outcome: the encoded image or video, or the failure.
        preview: the last preview as a PNG; ``previews`` counts them.
    """

    prompt: str
    negative_prompt: str
    seed: int
    settings: dict[str, Any]
    image: bytes | None = None
    preview_every: int = 0
    retry: bool = False
    most: int = 1
    ranks: dict[int, float] = field(default_factory=dict)
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    arrived: float = field(default_factory=time.time)
    outcome: bytes | Failure | None = None
    step: int = 0
    preview: bytes | None = None
    previews: int = 0
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    @property
    def kind(self) -> tuple:
        """Equal for jobs that one call can run with the same results as separate calls."""
        alone = self.id if self.image is not None else None
        return *sorted(self.settings.items()), bool(self.negative_prompt), self.most, tuple(self.ranks), alone

    def finish(self, outcome: bytes | Failure) -> None:
        """Set the outcome, unless there already is one (the job was cancelled)."""
        if self.outcome is None:
            self.outcome = outcome
            self.changed.set()

    @property
    def failure(self) -> Failure | None:
        """The failure of a job that has failed."""
        return self.outcome if isinstance(self.outcome, Failure) else None

    def result(self) -> bytes:
        """Return the encoded image or video of a job that has ended, or raise its :class:`Failure`."""
        if self.failure:
            raise self.failure.with_traceback(None)  # drops the traceback of an earlier raise
        assert self.outcome is not None
        return self.outcome

    async def progress(self) -> AsyncIterator[None]:
        """Yields at each new step or preview, and once at the end; supports one listener."""
        while self.outcome is None:
            await self.changed.wait()
            self.changed.clear()
            yield

    async def ended(self) -> "Job":
        """Wait for the outcome, and return the job."""
        async for _ in self.progress():
            pass
        return self


def calls_of(jobs: list[Job], parts: int = 1) -> list[list[Job]]:
    """Group jobs into calls, ordered by their oldest jobs; jobs of one kind are spread over ``parts`` calls.

    The oldest job is always in the first call, so no job waits for more calls than there were jobs before it in the
    queue.
    """
    kinds: dict[tuple, list[Job]] = {}
    for job in jobs:
        kinds.setdefault(job.kind, []).append(job)
    calls = []
    for alike in kinds.values():
        size = min(alike[0].most, -(-len(alike) // parts))
        calls += [alike[start : start + size] for start in range(0, len(alike), size)]
    places = {job: place for place, job in enumerate(jobs)}
    return sorted(calls, key=lambda call: places[call[0]])
