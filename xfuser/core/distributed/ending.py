"""Process groups that were made here end before the interpreter does.

A worker thread of gloo holds the tensors of a work for a moment longer than the one who waits for that work. To release
them it takes the interpreter's lock; once the interpreter shuts down, it ends every thread that asks for the lock, and
in a destructor that aborts the process (``terminate called without an active exception``, until Python 3.14). Nothing
but the destructor of the group joins its threads, so references must be dropped, too.
"""

import atexit
import os
import threading
import time
import weakref
from collections.abc import Callable
from datetime import timedelta

import torch.distributed as dist

PATIENCE = 10.0  # seconds for works that are still under way at the end, and wait for ranks that do not come
TIME_LIMIT = timedelta(minutes=30)  # of a collective; NCCL's own is 10, and other ranks may compile for longer
GRACE = 0.2  # seconds for threads of groups that live on to release what they hold

_made: weakref.WeakKeyDictionary[dist.ProcessGroup, None] = weakref.WeakKeyDictionary()  # in the order of their making
_process: int | None = None  # whose end is waited for


def new_group(ranks: list[int], backend: str | None = None) -> dist.ProcessGroup:
    """``dist.new_group``, of a group that ends with the interpreter."""
    return made_here(dist.new_group(ranks, backend=backend, timeout=TIME_LIMIT))


def made_here(group: dist.ProcessGroup) -> dist.ProcessGroup:
    """Note that a group is to be ended here; returns it."""
    if isinstance(group, dist.ProcessGroup):  # not the mark of a group of other ranks
        _made[group] = None
    return group


def is_made_here(group: dist.ProcessGroup | None) -> bool:
    """Whether :func:`made_here` was told of this group."""
    return group is not None and group in _made


def end_group(group: dist.ProcessGroup) -> None:
    """Destroy a process group, unless it went when the default one was destroyed."""
    if group in dist.distributed_c10d._world.pg_map:
        dist.destroy_process_group(group)


def end_at_exit(forget: Callable[[], None]) -> None:
    """Have the groups made here ended when the interpreter ends, behind ``forget``, which drops references to them.

    Handlers of ``atexit`` that are registered later than this run earlier, and still have the groups.
    """
    global _process
    if _process == os.getpid():
        return
    _process = process = os.getpid()
    asked = threading.Event()
    # The destructor of a group waits for its works: in a thread, that can be given up. Python 3.12 starts none at exit.
    ender = threading.Thread(target=_end, args=(asked, forget), name="xfuser-end", daemon=True)
    ender.start()

    def at_exit() -> None:
        if os.getpid() == process:  # threads are not there in a process that was forked off
            asked.set()
            ender.join(PATIENCE)

    atexit.register(at_exit)


def _end(asked: threading.Event, forget: Callable[[], None]) -> None:
    asked.wait()
    groups = list(_made)
    forget()
    for place in reversed(range(len(groups))):  # the default group, if it is one of them, comes last
        end_group(groups[place])
    groups.clear()
    if _made or dist.is_initialized():  # someone holds them, or they are the caller's own
        time.sleep(GRACE)
