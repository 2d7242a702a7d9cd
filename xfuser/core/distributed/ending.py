"""Destroys the process groups that were made here before the interpreter shuts down.

A gloo worker thread holds the tensors of a work slightly longer than the caller that waits for the work. To release
them, it takes the interpreter's lock. A shutting-down interpreter ends every thread that requests the lock; inside a
destructor, this aborts the process (``terminate called without an active exception``, until Python 3.14). Only the
destructor of a group joins its threads, so references to groups must be dropped, too.
"""

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

PATIENCE = 10.0  # seconds at exit for works in flight, which may wait for ranks that never come
TIME_LIMIT = timedelta(minutes=30)  # of a collective; NCCL's default is 10, but other ranks may compile for longer
GRACE = 0.2  # seconds for threads of surviving groups to release their tensors

_made: weakref.WeakKeyDictionary[dist.ProcessGroup, None] = weakref.WeakKeyDictionary()  # in order of creation
_process: int | None = None  # whose exit handler is registered


def new_group(ranks: list[int], backend: str | None = None) -> dist.ProcessGroup:
    """As ``dist.new_group``; the group is destroyed when the interpreter exits."""
    return made_here(dist.new_group(ranks, backend=backend, timeout=TIME_LIMIT))


def made_here(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Register a group to be destroyed at exit; returns the group."""
    if isinstance(group, dist.ProcessGroup):  # not NON_GROUP_MEMBER, which stands for a group of other ranks
        _made[group] = None
    return group


def is_made_here(group: dist.ProcessGroup | None) -> bool:
    """Whether :func:`made_here` registered this group."""
    return group is not None and group in _made


def end_group(group: dist.ProcessGroup, unfinished: bool = False) -> None:
    """Destroy a process group, unless destroying the default group has already done so.

    ``unfinished``: operations may be in flight that never complete. NCCL must abort these: it would wait for them.
    """
    if group in dist.distributed_c10d._world.pg_map:
        aborts = unfinished and dist.get_backend(group) == dist.Backend.NCCL
        (dist.distributed_c10d._abort_process_group if aborts else dist.destroy_process_group)(group)


def end_at_exit(forget: Callable[[], None]) -> None:
    """Destroy the groups made here when the interpreter exits, after ``forget``, which drops references to them.

    ``atexit`` handlers that are registered later run earlier, and can still use the groups.
    """
    global _process
    if _process == os.getpid():
        return
    _process = process = os.getpid()
    asked = threading.Event()
    # A group's destructor waits for its works; in a thread, that can be abandoned. Python 3.12 starts none at exit.
    ender = threading.Thread(target=_end, args=(asked, forget), name="xfuser-end", daemon=True)
    ender.start()

    def at_exit() -> None:
        if os.getpid() == process:  # a forked process does not have the thread
            asked.set()
            ender.join(PATIENCE)

    atexit.register(at_exit)


def _end(asked: threading.Event, forget: Callable[[], None]) -> None:
    asked.wait()
    groups = list(_made)
    forget()
    for place in reversed(range(len(groups))):  # the default group, if registered, comes last
        end_group(groups[place])
    groups.clear()
    if _made or dist.is_initialized():  # something else references them, or the caller made them
        time.sleep(GRACE)
