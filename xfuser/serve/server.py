"""The requests of clients, their conversion to jobs, and the state of one server behind API, page, and Ray."""

import asyncio
import base64
import io
import math
import os
import random
from argparse import Namespace
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, Literal

from fastapi import UploadFile
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from xfuser.cli.main import start
from xfuser.cli.words import check_words
from xfuser.config import xFuserArgs
from xfuser.config.config import DEGREES
from xfuser.core import device as devices
from xfuser.pipeline_io.media import FRAMES_PER_SECOND
from xfuser.planner.machines import calibrated
from xfuser.serve import elastic
from xfuser.serve.engine import Engine
from xfuser.serve.jobs import Failure, Job

WORKER = "xfuser.serve.worker:serve"  # the function that a rank runs
LONGEST_PROMPT, MOST_STEPS, SEEDS = 4000, 1000, 2**31
SETTINGS = ("num_inference_steps", "height", "width", "guidance_scale", "num_frames")
KEPT_FILES, KEPT_COUNTS, KEPT_VIDEOS = 1000, 1000, 100


class Request(BaseModel):
    """Fields common to images and videos."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=LONGEST_PROMPT)
    model: str | None = None
    size: str | None = Field(None, pattern=r"^(auto|\d{1,6}x\d{1,6})$")
    user: str | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    negative_prompt: str = Field("", max_length=LONGEST_PROMPT)
    num_inference_steps: int | None = Field(None, ge=1, le=MOST_STEPS)
    guidance_scale: float | None = Field(None, allow_inf_nan=False)
    retry: bool = False


class ImageRequest(Request):
    """``POST /v1/images/generations``."""

    n: int = Field(1, ge=1, le=10)
    response_format: Literal["b64_json", "url"] = "b64_json"
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=20)


class EditRequest(ImageRequest):
    """``POST /v1/images/edits``."""

    image: list[UploadFile] = Field(min_length=1, max_length=1)


class VideoRequest(Request):
    """``POST /v1/videos``."""

    seconds: int | None = Field(None, ge=1, le=60)
    num_frames: int | None = Field(None, ge=1, le=60 * FRAMES_PER_SECOND)
    image: list[UploadFile] = Field([], max_length=1, validation_alias="input_reference")


async def picture_of(request: Request) -> bytes | None:
    """Read the image that a request starts from; raises a :class:`Failure` for a file that is not an image."""
    if not getattr(request, "image", None):
        return None
    data = await request.image[0].read()
    try:
        await asyncio.to_thread(lambda: Image.open(io.BytesIO(data)).load())
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Failure(400, f"the file is not an image that can be read: {error}", "invalid_value", "image") from error
    return data


class Server:
    """Accepts requests as jobs and returns their results.

    Args:
        args: the configuration of the pipeline, and the defaults of requests.
        options: the server's own flags.

    Raises:
        ValueError: ``args`` are invalid.
    """

    def __init__(self, args: xFuserArgs, options: Namespace) -> None:
        self.args, self.options = args, options
        self.config, self.inputs = args.checked()
        devices.check_ranks(self.config.world_size)
        self.model = os.path.basename(self.config.model_config.model.rstrip("/"))
        self._sizes = elastic.sizes_of(self.config.world_size, options.elastic)
        launch = partial(start, self.config.world_size, WORKER, args, options.elastic)
        devices.preload(WORKER.partition(":")[0])
        self.engine = Engine(launch, self._sizes, self.inputs, options)
        self._memory = self.config.runtime_config.memory or devices.total_memory()
        self._machine = calibrated() if options.elastic else None
        self._counted = lru_cache(KEPT_COUNTS)(self._count)
        self._counter = ThreadPoolExecutor(1)  # one planner at a time, as it sets the global process groups
        self.folder, self._files = Path(options.output_dir), deque()
        self._requests: dict[str, list[Job]] = {}  # by the id of the first job

    async def submit(self, request: Request) -> list[Job]:
        """Queue a request: one job for each image.

        Raises:
            Failure: the request is not accepted.
        """
        try:
            if self.engine.why:
                raise Failure(503, f"not ready: {self.engine.why}", "not_ready")
            jobs = self.jobs_of(request, await picture_of(request))
            loop = asyncio.get_running_loop()
            ranks = await loop.run_in_executor(self._counter, self.ranks_for, jobs[0].settings)
            for job in jobs:
                job.ranks = ranks
            self.engine.submit(jobs)
        except Failure as failure:
            self.engine.metrics.failures.labels(failure.code).inc()
            raise
        self._requests[jobs[0].id] = jobs
        for name in [name for name, jobs in self._requests.items() if all(job.outcome for job in jobs)][:-KEPT_VIDEOS]:
            del self._requests[name]
        return jobs

    def jobs(self, name: str) -> list[Job]:
        """The jobs of a request, by the id of the first; stopped requests and older finished ones are not found."""
        if name not in self._requests:
            raise Failure(404, f"there is no video or running request {name!r}", "not_found")
        return self._requests[name]

    def stop(self, jobs: list[Job]) -> None:
        """Cancel and remove the request with these jobs."""
        self.engine.cancel(jobs)
        self._requests.pop(jobs[0].id, None)

    def jobs_of(self, request: Request, image: bytes | None = None) -> list[Job]:
        """Create a request's jobs, with consecutive seeds; raises a :class:`Failure` if the model cannot serve it."""
        can = self.engine.abilities
        if request.model not in (None, self.model):
            told = f"model={request.model!r} is not served here: use {self.model!r}"
            raise Failure(404, told, "model_not_found", "model")
        if isinstance(request, VideoRequest) != can["videos"]:
            path = "/v1/videos" if can["videos"] else "/v1/images/generations"
            raise Failure(400, f"{can['pipeline']} does not generate this: use POST {path}", "unsupported_endpoint")
        if image and not can["pictures"]:
            raise Failure(400, f"{can['pipeline']} takes no image: remove it", "unsupported_endpoint", "image")
        try:
            check_words(self.config.model_config.model, request.prompt, request.negative_prompt)
        except ValueError as error:
            raise Failure(400, str(error), "invalid_value", "prompt") from error
        settings = self._settings(request)
        seed = random.randrange(SEEDS) if request.seed is None else request.seed
        previews = getattr(request, "partial_images", 0)
        every = math.ceil(settings["num_inference_steps"] / (previews + 1)) if previews else 0
        common = {"settings": settings, "image": image, "preview_every": every, "retry": request.retry}
        common |= {"prompt": request.prompt, "negative_prompt": request.negative_prompt, "most": self.options.max_batch}
        return [Job(seed=(seed + place) % 2**63, **common) for place in range(getattr(request, "n", 1))]

    def _settings(self, request: Request) -> dict[str, Any]:
        given = {name: getattr(request, name, None) for name in SETTINGS}
        if request.size not in (None, "auto"):
            given["width"], given["height"] = self._sides(request.size)
        if getattr(request, "seconds", None) and not request.num_frames:
            given["num_frames"] = request.seconds * FRAMES_PER_SECOND + 1
        return {name: getattr(self.inputs, name) if value is None else value for name, value in given.items()}

    def _sides(self, size: str) -> list[int]:
        multiple, most = self.engine.abilities["multiple"], self.options.max_side
        sides = [int(side) for side in size.split("x")]
        near = [max(1, min(side, most) // multiple) * multiple for side in sides]
        if sides != near:
            allowed = f"both must be multiples of {multiple} from {multiple} to {most}, such as {near[0]}x{near[1]}"
            raise Failure(400, f"size={size!r} is not supported: {allowed}", "invalid_value", "size")
        return sides

    def entry(self, job: Job, response_format: str, base: str) -> dict[str, Any]:
        """An image in the format of OpenAI's API, with its seed; for a URL, it is written to the output folder."""
        if response_format == "b64_json":
            return {"b64_json": base64.b64encode(job.result()).decode(), "seed": job.seed}
        file = self.folder / f"{job.id}.png"
        self.folder.mkdir(parents=True, exist_ok=True)
        file.write_bytes(job.result())
        self._files.append(file)
        if len(self._files) > KEPT_FILES:
            self._files.popleft().unlink(missing_ok=True)
        return {"url": f"{base}files/{file.name}", "seed": job.seed}

    def ranks_for(self, settings: dict[str, Any]) -> dict[int, float]:
        """The numbers of ranks with enough memory for an image, by the planner's count, with the predicted seconds
        (0 for a machine that is not calibrated); empty if nothing needs to be counted.

        Raises:
            Failure: the image requires too much memory on every number of ranks.
        """
        if self._memory is None and self._machine is None:
            return {}
        counts = self._counted(settings["height"], settings["width"], settings["num_frames"])
        fitting = {size: time for size, (need, *time) in counts.items() if need <= (self._memory or math.inf)}
        if not fitting:
            least = min(need for need, *_ in counts.values())
            told = f"it takes {least / 1e9:.3g} GB of a rank, which has {self._memory / 1e9:.3g} GB"
            raise Failure(400, f"{told}: ask for a smaller size", "out_of_memory", "size")
        more = settings["num_inference_steps"] - 1
        return {size: first + more * step for size, (first, step) in fitting.items()}

    def _count(self, height: int, width: int, num_frames: int | None) -> dict[int, tuple[float, float, float]]:
        """By number of ranks: bytes per rank, seconds of a call with one step, and seconds of each further step; 0 if
        the planner does not know them."""
        from xfuser.planner.table import plan  # imports Diffusers

        parallel, counts = self.config.parallel_config, {}
        for size in self._sizes:
            team = elastic.degrees_of(parallel, size)
            degrees = {name: getattr(team, names.field) for name, names in DEGREES.items()}
            picture = {"height": height, "width": width, "num_frames": num_frames, "num_inference_steps": 1}
            args = replace(self.args, **picture, prompt=["a"] * team.dp_degree)
            (row,) = plan(args, size, self._machine, self.args.use_torch_compile, [degrees])
            time = (row.time.seconds, row.time.step) if row.time else (0.0, 0.0)
            counts[size] = 0.0 if row.refusal else row.peak, *time
        return counts
