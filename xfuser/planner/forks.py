"""One result after the other, by forks of this process where there are many."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

MANY = 6  # choices that are worth processes of their own


def each(function: Callable[[Any], Any], choices: list[Any], ready: Callable[[Any], bool]) -> list[Any]:
    """What a function gives for each of these choices.

    Of many, forks of this process take the rest once a result is ``ready``: what all have in common is known then.

    Raises:
        RuntimeError: a fork was killed.
    """
    found: list[Any] = []
    while len(found) < len(choices) and (len(choices) < MANY or not any(map(ready, found))):
        found.append(function(choices[len(found)]))
    rest = choices[len(found) :]
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else 1
    if cores == 1 or not rest:
        return found + [function(one) for one in rest]
    context = multiprocessing.get_context("fork")
    try:
        with ProcessPoolExecutor(min(cores, len(rest)), context, _begin, (function,)) as pool:
            return found + list(pool.map(_result, rest))
    except BrokenProcessPool:
        raise RuntimeError(
            "a process that counts combinations was killed, maybe for lack of memory: free some, or count on one core"
            " (taskset -c 0)"
        ) from None


_kept: list[Callable[[Any], Any]] = []  # of a fork, which takes it from the process that it began as


def _begin(function: Callable[[Any], Any]) -> None:
    """A fork has none of OpenMP's other threads, and would wait for them; it ends as its parent does, and is silent."""
    _kept.append(function)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _result(choice: Any) -> Any:
    return _kept[0](choice)
