"""Apply a function to each of several choices, in forks of this process if there are many."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import Any

import torch

MANY = 6  # number of choices from which on forks pay off


def each(function: Callable[[Any], Any], choices: list[Any], ready: Callable[[Any], bool]) -> list[Any]:
    """Return the function's result for each choice.

    With many choices, forks take the rest once a result is ``ready``: they inherit the state that all choices share.

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
            "a planning process was killed, maybe for lack of memory: free memory, or use only one core (taskset -c 0)"
        ) from None


_kept: list[Callable[[Any], Any]] = []  # in a fork: the function, set by _begin


def _begin(function: Callable[[Any], Any]) -> None:
    """Use one thread, as a fork lacks OpenMP's others and would wait for them; end silently, and with the parent."""
    _kept.append(function)
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_DFL)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _result(choice: Any) -> Any:
    return _kept[0](choice)
