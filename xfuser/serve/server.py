"""The state of one server, and what its API, its page and Ray do with it."""

import asyncio
import base64
import os
import threading
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

from xfuser.cli.main import launch
from xfuser.config import xFuserArgs
from xfuser.core import device as devices
from xfuser.planner.rehearsal import alone_of, configs_of, rehearse
from xfuser.planner.table import needs_of
from xfuser.serve.engine import Engine
from xfuser.serve.jobs import Failure, Job, JobQueue
from xfuser.serve.metrics import Metrics
from xfuser.serve.options import Options
from xfuser.serve.requests import Limits, Request, check_picture

LOOK = 0.03  # seconds between looks at the progress of a job
KEPT_FILES = 1000


class Server:
    """Accepts requests as jobs and hands out their results.

    Args:
        args: how the pipeline runs, and defaults of requests.
        arguments: the same as command-line flags, for the ranks.

    Raises:
        ValueError: ``args`` are wrong.
    """

    def __init__(self, args: xFuserArgs, arguments: list[str], options: Options) -> None:
        self.args, self.options, self.metrics = args, options, Metrics()
        self.engine_config, self.inputs = args.checked()
        self.model = os.path.basename(self.engine_config.model_config.model.rstrip("/"))
        self.limits = Limits(self.engine_config, self.inputs, options.max_side, options.max_batch)
        self.queue = JobQueue(options.max_queue)
        self.metrics.queue.set_function(lambda: len(self.queue))
        ranks = self.engine_config.world_size

        def start(address: str) -> None:
            launch(ranks, ["serve", *arguments, "--engine", address])

        self.engine = Engine(start, ranks, self.queue, self.metrics, options.hang_timeout)
        self._needs: dict[tuple, int] = {}
        self._counting = threading.Lock()
        self._files: OrderedDict[str, None] = OrderedDict()

    def why_not_ready(self) -> str:
        """Empty where requests are accepted."""
        return f"the engine ended: {self.engine.why}" if self.engine.dead else self.engine.why

    async def submit(self, request: Request, image: bytes | None = None) -> list[Job]:
        """Put the jobs of a request into the queue.

        Raises:
            Failure: they are not accepted.
        """
        try:
            if self.engine.why or self.engine.abilities is None:
                raise Failure(503, f"not ready: {self.why_not_ready()}", "not_ready")
            if image:
                check_picture(image)
            jobs = self.limits.jobs(request, self.engine.abilities, self.model, image)
            await asyncio.to_thread(self.check_memory, jobs[0].settings)
            self.queue.put(jobs)
        except Failure as failure:
            self.metrics.failures.labels(failure.code).inc()
            raise
        return jobs

    def cancel(self, jobs: list[Job]) -> None:
        """End these jobs within one step; what is done stays done."""
        for job in jobs:
            self.queue.cancel(job)

    async def progress(self, job: Job) -> AsyncIterator[Job]:
        """The job whenever its step or preview is a new one, and once when it ended."""
        seen = (0, 0)
        while not job.future.done():
            if (job.step, job.previews) != seen:
                seen = (job.step, job.previews)
                yield job
            await asyncio.sleep(LOOK)
        yield job

    def write(self, job: Job) -> str:
        """Write a picture into the output folder, whose oldest files of this server go; returns the file's name."""
        os.makedirs(self.options.output_dir, exist_ok=True)
        name = f"{job.id}.png"
        with open(self.path(name), "wb") as file:
            file.write(job.future.result())
        self._files[name] = None
        if len(self._files) > KEPT_FILES:
            os.unlink(self.path(self._files.popitem(last=False)[0]))
        return name

    def path(self, name: str) -> str:
        """Of a file in the output folder, whatever else ``name`` says."""
        return os.path.join(self.options.output_dir, os.path.basename(name))

    def entry(self, job: Job, response_format: str, base: str) -> dict[str, Any]:
        """A picture as OpenAI's API gives it, with its seed."""
        if response_format == "url":
            return {"url": f"{base}files/{self.write(job)}", "seed": job.seed}
        return {"b64_json": base64.b64encode(job.future.result()).decode(), "seed": job.seed}

    def check_memory(self, settings: dict[str, Any]) -> None:
        """Refuse, by the planner's count, what one picture of this shape takes too much memory for."""
        memory = self.engine_config.runtime_config.memory or devices.total_memory()
        if memory is None:
            return
        shape = {name: settings[name] for name in ("height", "width", "num_frames")}
        with self._counting:  # the planner stands in for process groups, which there is one set of
            key = tuple(shape.values())
            if key not in self._needs:
                self._needs[key] = self._needed(shape)
        if self._needs[key] > memory:
            told = f"it takes {self._needs[key] / 1e9:.3g} GB of a rank, which has {memory / 1e9:.3g} GB"
            raise Failure(400, f"{told}: ask for a smaller size", "out_of_memory", "size")

    def _needed(self, shape: dict[str, Any]) -> int:
        model = configs_of(self.engine_config.model_config.model, self.args.download_dir)
        plain = {"text_encoder": "replicate", "fully_shard_degree": 1}
        steps = self.args.warmup_steps + 2
        args = replace(self.args, model=model, prompt="a", num_inference_steps=steps, **shape, **plain)
        with alone_of(self.engine_config.world_size):
            memory = rehearse(*args.checked())
        shards = self.engine_config.parallel_config.fully_shard_degree
        return needs_of(memory, self.args.text_encoder, self.engine_config.world_size, shards)["peak"]


def error_body(failure: Failure) -> dict[str, Any]:
    """In the shape of OpenAI's errors."""
    kind = "invalid_request_error" if failure.status < 429 else "server_error"
    return {"error": {"message": str(failure), "type": kind, "param": failure.param, "code": failure.code}}
