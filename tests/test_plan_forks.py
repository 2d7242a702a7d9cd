"""Combinations counted in forks of the planning process."""

import multiprocessing
import os
import select
import signal
import time

import pytest
import torch
from test_planning import asked

from xfuser.planner import forks
from xfuser.planner.machines import machine_of
from xfuser.planner.table import plan


def test_forks_count_what_one_process_counts(folder_of, monkeypatch):
    """Includes PixArt-alpha, whose pipeline fails with one step, by which most others are counted."""
    args, found = asked(folder_of("pixart_alpha"), {}), []
    for cores in (1, 2):
        monkeypatch.setattr(os, "sched_getaffinity", lambda _, cores=cores: set(range(cores)), raising=False)
        monkeypatch.setattr(forks, "MANY", 2)
        degrees = [{"ulysses": 2}, {"cfg": 2}]
        found.append(plan(args, 2, machine_of("H100"), False, degrees))
    alone, forked = found
    assert [(row.name, row.needs, row.time) for row in forked] == [(row.name, row.needs, row.time) for row in alone]
    assert all(row.time for row in forked)


def forked(action):
    """Return an action's results in seven forks on two cores; the first result is that of this process."""
    parent = os.getpid()
    return forks.each(lambda _: action() if os.getpid() != parent else None, [None] * 8, lambda _: True)[1:]


def test_forks_wait_for_no_threads_of_their_parent(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        torch.ones(1 << 20).sum()
        rows = forked(lambda: (signal.alarm(20), torch.ones(1 << 20).sum().item())[1])  # killed if it waits
        assert rows == [1 << 20] * 7
    finally:
        torch.set_num_threads(threads)


def test_killed_forks_end_the_plan(monkeypatch):
    """The plan waits for none of them, and they end when the plan itself is killed."""
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1}, raising=False)
    with pytest.raises(RuntimeError, match="was killed"):
        forked(lambda: os.kill(os.getpid(), signal.SIGKILL))
    begun, begin = os.pipe()
    planning = multiprocessing.get_context("fork").Process(
        target=forked, args=(lambda: (os.write(begin, b"x"), time.sleep(60)),)
    )
    planning.start()
    os.close(begin)
    assert os.read(begun, 1) and os.read(begun, 1)
    planning.kill()
    assert select.select([begun], [], [], 10)[0] and os.read(begun, 1) == b""  # no process has it open
    os.close(begun)
