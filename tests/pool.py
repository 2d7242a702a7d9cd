"""One pool of processes for the whole test session: each test borrows the first n of them as ranks."""

import os
import sys
import tempfile
import traceback
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

TIMEOUT = 120  # seconds for one job


class RankPool:
    """``run(n, function, *args)`` calls ``function(*args)`` on n ranks and returns their results in rank order."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._workers: list[tuple[Any, Any]] = []

    def run(self, ranks: int, function: Callable[..., Any], *args: Any) -> list[Any]:
        if not self._workers:
            self._start()
        with tempfile.TemporaryDirectory() as folder:
            store = os.path.join(folder, "store")
            for rank, (_, pipe) in enumerate(self._workers[:ranks]):
                pipe.send((rank, ranks, store, function, args))
            answers = [self._answer(rank) for rank in range(ranks)]
        failures = [f"rank {rank}:\n{text}" for rank, (failed, text) in enumerate(answers) if failed]
        if failures:
            self.close()  # ranks may wait for each other
            raise RuntimeError("\n".join(failures))
        return [result for _, result in answers]

    def close(self) -> None:
        for process, _ in self._workers:
            process.kill()
            process.join()
        self._workers = []

    def _start(self) -> None:
        context = mp.get_context("spawn")
        for _ in range(self._size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs, sys.path), daemon=True)
            process.start()
            self._workers.append((process, ours))

    def _answer(self, rank: int) -> tuple[bool, Any]:
        process, pipe = self._workers[rank]
        try:
            if pipe.poll(TIMEOUT):
                return pipe.recv()
            return True, f"no answer within {TIMEOUT} s"
        except (EOFError, ConnectionError):
            process.join()
            return True, f"died with exit code {process.exitcode}"


def _serve(pipe: Any, path: list[str]) -> None:
    sys.path[:] = path
    import torch
    import torch.distributed as dist

    from xfuser.core.distributed import destroy_distributed_environment

    torch.set_num_threads(1)
    while True:
        rank, ranks, store, function, args = pipe.recv()
        try:
            dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
            result = function(*args)
            destroy_distributed_environment()
            dist.destroy_process_group()
            pipe.send((False, result))
        except BaseException:
            pipe.send((True, traceback.format_exc()))
