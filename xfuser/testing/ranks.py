"""A pool of persistent processes: each job uses the first n of them as ranks."""

import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from multiprocessing.connection import wait
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from tqdm import tqdm

from xfuser.core import device as devices

TIMEOUT = 120  # seconds for one job
PATIENCE = 5  # seconds to wait for the other ranks after one has failed
IMPORTED = [
    "xfuser.testing.matrix",
    "diffusers.models.transformers",
    "diffusers.loaders",
    "transformers.modeling_utils",
]


class RankPool:
    """``run(n, function, *args)`` calls ``function(*args)`` on n ranks and returns their results in rank order.

    ``backend`` is the backend of the default process group; an accelerator's backend requires one device per rank.
    """

    def __init__(self, size: int, backend: str = "gloo") -> None:
        self._size, self._jobs, self._backend = size, 0, backend
        self._workers: list[tuple[Any, Any]] = []

    def run(self, ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        """Call a function on the first ``ranks`` ranks and return their results.

        Raises:
            RuntimeError: the function failed on a rank; the message has the traceback of each failed rank.
        """
        if not self._workers:
            self._start()
        self._jobs += 1
        for rank, (_, pipe) in enumerate(self._workers[:ranks]):
            pipe.send((rank, ranks, f"job {self._jobs}", function, args))
        answers = self._answers(ranks)
        failures = [f"rank {rank}:\n{text}" for rank, (failed, text) in enumerate(answers) if failed]
        if failures:
            self.close()  # ranks may wait for each other
            raise RuntimeError("\n".join(failures))
        return [result for _, result in answers]

    def close(self) -> None:
        """Kill the processes of the ranks."""
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        devices.preload(*IMPORTED)
        context = mp.get_context("forkserver")
        self._store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)  # rendezvous of the ranks
        for _ in range(self._size):
            ours, theirs = context.Pipe()
            args = (theirs, sys.path, self._store.port, self._backend)
            process = context.Process(target=_serve, args=args, daemon=True)
            process.start()
            self._workers.append((process, ours))

    def _answers(self, ranks: int) -> list[tuple[bool, Any]]:
        """Return (failed, result) of each rank; after a failure, the other ranks get only ``PATIENCE`` seconds."""
        answers: dict[int, tuple[bool, Any]] = {}
        deadline = time.monotonic() + TIMEOUT
        while len(answers) < ranks and (left := deadline - time.monotonic()) > 0:
            open_pipes = {self._workers[rank][1]: rank for rank in range(ranks) if rank not in answers}
            for pipe in wait(list(open_pipes), timeout=left):
                answers[open_pipes[pipe]] = self._answer(open_pipes[pipe])
                if answers[open_pipes[pipe]][0]:
                    deadline = min(deadline, time.monotonic() + PATIENCE)
        return [answers.get(rank, (True, "no answer in time")) for rank in range(ranks)]

    def _answer(self, rank: int) -> tuple[bool, Any]:
        process, pipe = self._workers[rank]
        try:
            return pipe.recv()
        except (EOFError, ConnectionError):
            process.join()
            return True, f"died with exit code {process.exitcode}"


def _serve(pipe: Any, path: list[str], port: int, backend: str) -> None:
    sys.path[:] = path
    tqdm.set_lock(threading.RLock())  # instead of a semaphore, which outlives a killed process
    torch.set_num_threads(1)
    store = dist.TCPStore("localhost", port, is_master=False)
    while True:
        rank, ranks, job, function, args = pipe.recv()
        try:
            if backend != "gloo":
                devices.use(rank)
            options = devices.group_options(rank, backend)
            dist.init_process_group(backend, store=dist.PrefixStore(job, store), rank=rank, world_size=ranks, **options)
            dist.barrier()  # otherwise a rank with little work may leave before others connect to it
            result = function(*args)
            _leave()
            pipe.send((False, result))
        except BaseException:
            pipe.send((True, traceback.format_exc()))


def _leave() -> None:
    """Leave all process groups, and destroy them in the background: gloo waits 10 ms for the thread of each."""
    from xfuser.core.distributed import destroy_distributed_environment

    groups = list(dist.distributed_c10d._world.pg_map)
    destroy_distributed_environment()
    dist.destroy_process_group()
    threading.Thread(target=groups.clear).start()


def own_parallelism_runs_here() -> AbstractContextManager[Any]:
    """Context for Diffusers' context parallelism on the CPU: it divides by the number of devices, which must be 1."""
    on_cpu = devices.device_type() == "cpu"
    return mock.patch.object(torch.accelerator, "device_count", lambda: 1) if on_cpu else nullcontext()
