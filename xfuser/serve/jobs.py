"""One job an image or video, and which jobs are drawn together."""

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
        """In the shape of OpenAI's errors."""
        kind = "invalid_request_error" if self.status < 429 else "server_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(eq=False)
class Job:
    """One image or video.

    Attributes:
        settings: what all jobs of a call have in common: fields of ``InputConfig``.
        image: an encoded image to start from; such jobs are drawn alone.
        preview_every: steps from one preview to the next, 0 for none.
        retry: whether it is drawn once more if the ranks end while they draw it.
        most: the largest number of images in its call.
        ranks: how many it may be drawn on, with the seconds that the planner predicts, 0 where it predicts none.
        outcome: the encoded image or video, or why there is none.
        preview: the last one, as a PNG; ``previews`` counts them.
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
        """Equal for jobs that one call can draw, each as it would be alone."""
        alone = self.id if self.image is not None else None
        return *sorted(self.settings.items()), bool(self.negative_prompt), self.most, tuple(self.ranks), alone

    def finish(self, outcome: bytes | Failure) -> None:
        """Note the outcome, unless there is one already, as of a job that was cancelled."""
        if self.outcome is None:
            self.outcome = outcome
            self.changed.set()

    @property
    def failure(self) -> Failure | None:
        """Why there is no result, where that is known."""
        return self.outcome if isinstance(self.outcome, Failure) else None

    def result(self) -> bytes:
        """The encoded image or video of a job that has ended, or its :class:`Failure`."""
        if self.failure:
            raise self.failure.with_traceback(None)  # one of an earlier call would be kept with it
        assert self.outcome is not None
        return self.outcome

    async def progress(self) -> AsyncIterator[None]:
        """Whenever there is a new step or preview, and once when it has ended; for one listener."""
        while self.outcome is None:
            await self.changed.wait()
            self.changed.clear()
            yield

    async def ended(self) -> "Job":
        """Itself, once it has an outcome."""
        async for _ in self.progress():
            pass
        return self


def calls_of(jobs: list[Job], parts: int = 1) -> list[list[Job]]:
    """Jobs as calls, in the order of their oldest jobs; jobs of a kind are spread over so many parts.

    The oldest job is in the first call, whatever its shape: no job waits for more calls than there were jobs ahead of
    it.
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
