"""The state of one server, and what its API, its page and Ray do with it."""

import asyncio
import base64
import os
import threading
from argparse import Namespace
from collections import OrderedDict
from dataclasses import replace
from typing import Any

from xfuser.cli.main import launch
from xfuser.config import xFuserArgs
from xfuser.config.config import DEGREES
from xfuser.core import device as devices
from xfuser.planner.estimate import Estimate, counted, estimate
from xfuser.planner.machines import calibrated
from xfuser.planner.published import configs_of
from xfuser.planner.rehearsal import alone_of, rehearse
from xfuser.planner.table import needs_of, with_degrees
from xfuser.serve import elastic
from xfuser.serve.engine import Engine, Metrics
from xfuser.serve.jobs import Failure, Job, JobQueue
from xfuser.serve.requests import Limits, Request

KEPT_FILES = 1000


class Server:
    """Accepts requests as jobs and hands out their results.

    Args:
        args: how the pipeline runs, and defaults of requests.
        arguments: the same as command-line flags, for the ranks.
        options: the server's own flags.

    Raises:
        ValueError: ``args`` are wrong.
    """

    def __init__(self, args: xFuserArgs, arguments: list[str], options: Namespace) -> None:
        self.args, self.options, self.metrics = args, options, Metrics()
        self.config, self.inputs = args.checked()
        folder, ranks = self.config.model_config.model, self.config.world_size
        self.model = os.path.basename(folder.rstrip("/"))
        self.limits = Limits(folder, self.model, self.inputs, options.max_side, options.max_batch)
        self.queue = JobQueue(options.max_queue)
        self._sizes = elastic.sizes_of(ranks, options.elastic)

        def start(address: str) -> None:
            launch(ranks, ["serve", *arguments, "--engine", address])

        self.engine = Engine(start, ranks, self._sizes, self.queue, self.metrics, options.hang_timeout)
        self._machine = calibrated() if options.elastic else None
        self._counted: dict[tuple, dict[int, tuple[int, Estimate]]] = {}
        self._counting = threading.Lock()
        self._files: OrderedDict[str, None] = OrderedDict()

    async def submit(self, request: Request, image: bytes | None = None) -> list[Job]:
        """Put the jobs of a request into the queue.

        Raises:
            Failure: they are not accepted.
        """
        try:
            if self.engine.why or self.engine.abilities is None:
                raise Failure(503, f"not ready: {self.engine.why}", "not_ready")
            jobs = self.limits.jobs(request, self.engine.abilities, image)
            ranks = await asyncio.to_thread(self.ranks_for, jobs[0].settings)
            for job in jobs:
                job.ranks = dict(ranks)
            self.engine.submit(jobs)
        except Failure as failure:
            self.metrics.failures.labels(failure.code).inc()
            raise
        return jobs

    def entry(self, job: Job, response_format: str, base: str) -> dict[str, Any]:
        """A picture as OpenAI's API gives it, with its seed."""
        if response_format == "url":
            return {"url": f"{base}files/{self._write(job)}", "seed": job.seed}
        return {"b64_json": base64.b64encode(job.result()).decode(), "seed": job.seed}

    def path(self, name: str) -> str:
        """Of a file in the output folder, whatever else ``name`` says."""
        return os.path.join(self.options.output_dir, os.path.basename(name))

    def _write(self, job: Job) -> str:
        """Write a picture into the output folder, whose oldest files of this server go; returns the file's name."""
        os.makedirs(self.options.output_dir, exist_ok=True)
        name = f"{job.id}.png"
        with open(self.path(name), "wb") as file:
            file.write(job.result())
        self._files[name] = None
        if len(self._files) > KEPT_FILES:
            os.unlink(self.path(self._files.popitem(last=False)[0]))
        return name

    def ranks_for(self, settings: dict[str, Any]) -> dict[int, float]:
        """The numbers of ranks that have the memory for a picture, by the planner's count, and the seconds that it
        predicts where it knows this machine; empty where nothing needs to be counted.

        Raises:
            Failure: it takes too much on any number of ranks.
        """
        memory = self.config.runtime_config.memory or devices.total_memory()
        if memory is None and self._machine is None:
            return {}
        shape = {name: settings[name] for name in ("height", "width", "num_frames")}
        with self._counting:  # the planner stands in for process groups, which there is one set of
            key = tuple(shape.values())
            if key not in self._counted:
                self._counted[key] = {size: self._count(shape, size) for size in self._sizes}
        counts = self._counted[key]
        fitting = {size: time for size, (need, time) in counts.items() if memory is None or need <= memory}
        if not fitting:
            least = min(need for need, _ in counts.values())
            told = f"it takes {least / 1e9:.3g} GB of a rank, which has {memory / 1e9:.3g} GB"
            raise Failure(400, f"{told}: ask for a smaller size", "out_of_memory", "size")
        more = settings["num_inference_steps"] - 1
        return {size: time.seconds + more * time.step for size, time in fitting.items()}

    def _count(self, shape: dict[str, Any], size: int) -> tuple[int, Estimate]:
        """Bytes of a rank, and seconds of a call with one step; all 0 where the machine is not known."""
        parallel, compiled = elastic.degrees_of(self.config.parallel_config, size), self.args.use_torch_compile
        plain = {"text_encoder": "replicate", "fully_shard_degree": 1, "use_split_batch": False}
        plain |= {"use_torch_compile": False, "num_inference_steps": self.args.warmup_steps + 2, "prompt": "a"}
        model = configs_of(self.config.model_config.model, self.args.download_dir)
        args = with_degrees(self.args, {name: getattr(parallel, names.field) for name, names in DEGREES.items()})
        with alone_of(size):
            told = rehearse(*replace(args, model=model, **shape, **plain).checked())
        need = needs_of(told, self.args.text_encoder, size, parallel.fully_shard_degree)["peak"]
        machine = self._machine
        return need, estimate(counted(told, 1, compiled), machine, 1, 0, compiled) if machine else Estimate()
