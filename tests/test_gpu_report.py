"""The GPU report: it runs without a GPU, ticks only paths that have run, and fails if a check fails."""

import os
import subprocess
import sys
from pathlib import Path
from unittest import mock

import accelerator
import pytest
import torch
import torch.distributed as dist
from pretended import NAME, pretended

from xfuser.core import device as devices
from xfuser.core.distributed import destroy_distributed_environment
from xfuser.testing import matrix
from xfuser.testing.gpu import ranks, speed
from xfuser.testing.gpu.report import PATHS, Check, outcome_of, render, state_of
from xfuser.testing.gpu.staging import Staged
from xfuser.testing.ranks import own_parallelism_runs_here

ROOT = Path(__file__).parent.parent


def test_it_runs_here_and_ticks_nothing():
    command = [sys.executable, "-m", "xfuser.testing.gpu", "--device", "cpu", "--short"]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    boxes = [line for line in done.stdout.splitlines() if line.startswith("- [")]
    assert len(boxes) == len(PATHS) and all(line.startswith("- [ ]") and "not run" in line for line in boxes)
    assert "7 of 9 checks passed on the CPU" in done.stdout and ", 0 failed," in done.stdout


def outcome(name, result):
    """Return the outcome of a check that returns this text, raises this error, or cannot run ("-" and the reason)."""

    def run():
        if isinstance(result, Exception):
            raise result
        return result

    why = str(result).removeprefix("-")
    return outcome_of(Check("tensor", name, run, None if why == str(result) else why))


def outcomes(results):
    return [outcome(f"check {i}", result) for i, result in enumerate(results)]


@pytest.mark.parametrize(
    ("results", "accelerated", "box", "told"),
    [
        (("1e-7", "2e-7"), True, "[x]", "2 of 2 checks passed"),
        (("1e-7", "2e-7"), False, "[ ]", "not run on a GPU"),
        (("1e-7", "-it takes 2"), True, "[ ]", "in part: 1 of 2 checks passed; check 1 not run: it takes 2"),
        (("-it takes 2", "-it takes 4"), True, "[ ]", "not run: it takes 2"),
        (("1e-7", ValueError("rank 0:\nno\nyes\nrank 1:\nno")), True, "[ ]", "**failed**: check 1: ValueError: yes"),
        ((), True, "[ ]", "not run"),
    ],
)
def test_a_path_is_ticked_when_all_of_it_has_run(results, accelerated, box, told):
    found = state_of("tensor", outcomes(results), accelerated)
    assert found[0] == box and told in found[1]
    assert f"- {box} {PATHS['tensor']} — {found[1]}" in render(outcomes(results), accelerated)


def test_the_list_of_paths_is_that_of_the_docs():
    listed = (ROOT / "docs" / "design.md").read_text()
    assert all(f"- {title}" in listed for title in PATHS.values())


def loops(degrees):
    with speed.called(speed.SMALL[0], degrees) as call:
        return call()[0]


@pytest.mark.parametrize("flag", speed.OVERLAPPED)
def test_loops_whose_messages_a_profiler_sees(pool, flag):
    (expected,) = pool.run(1, loops, {})
    for latents in pool.run(2, loops, {flag: 2}):
        error = (latents - expected).abs().max() / expected.abs().max()
        assert error <= 1e-5 or (0 < error < 0.1 and "fusion" in flag)


def test_time_of_messages_that_is_hidden():
    messages, computes = speed.union([(0, 4), (2, 6), (10, 12)]), speed.union([(5, 11)])
    assert messages == [(0, 6), (10, 12)]
    whole, both = speed.length(messages), speed.length(speed.union(messages + computes))
    assert whole + speed.length(computes) - both == 2


def by_the_host():
    """Return the results of the methods' collectives, for tensors on a device that gloo does not support."""
    with pretended():
        group, rank = dist.new_group(backend=f"cpu:gloo,{NAME}:gloo"), dist.get_rank()
        with Staged():
            x = torch.arange(4, device=NAME) + 10 * rank
            total = x.clone()
            dist.all_reduce(total, group=group)
            parts = [torch.empty_like(x) for _ in range(2)]
            dist.all_gather(parts, x, group=group)
            dist.broadcast(first := x.clone(), src=0, group=group)
            swapped = torch.empty(2 + 4 * rank, dtype=x.dtype, device=NAME)
            dist.all_to_all_single(swapped, x, [1 + 2 * rank] * 2, [1, 3], group=group)
            received = torch.empty_like(x)
            operations = [dist.P2POp(dist.isend, x, 1 - rank, group), dist.P2POp(dist.irecv, received, 1 - rank, group)]
            [work.wait() for work in dist.batch_isend_irecv(operations)]
            late = torch.empty_like(x)
            works = [dist.irecv(late, 1 - rank, group=group), dist.isend(x, 1 - rank, group=group)]
            [work.wait() for work in works]
        assert {one.device.type for one in (total, *parts, first, received, late, swapped)} == {NAME}
        return [one.tolist() for one in (total, *parts, first, received, late, swapped)]


def test_collectives_go_by_the_host(pool):
    own, other = [0, 1, 2, 3], [10, 11, 12, 13]
    expected = [[10, 12, 14, 16], own, other, own]
    swapped = [[0, 10], [1, 2, 3, 11, 12, 13]]
    assert pool.run(2, by_the_host) == [[*expected, other, other, swapped[0]], [*expected, own, own, swapped[1]]]


def shared(*cell):
    """Return the result of a rank of the report that shares a device with others."""
    with pretended(f"cpu:gloo,{NAME}:gloo"):
        result, _ = ranks.drawn(*cell, torch.float32)
        destroy_distributed_environment()
        return result


def place_of_four():
    """The device of a rank that shares one with others, on a machine with four."""
    four = mock.patch.object(torch.accelerator, "device_count", lambda: 4)
    with pretended(f"cpu:gloo,{NAME}:gloo"), four, ranks.on_device() as device:
        return device.index, devices.device(3).index


def test_the_device_that_ranks_share_is_the_first(pool):
    assert pool.run(2, place_of_four) == [(0, 0)] * 2


@pytest.mark.parametrize("method", matrix.METHODS)
def test_ranks_share_a_device(pool, method):
    count, degrees, call = matrix.setting("flux", method)
    expected = matrix.reference("flux", degrees, call)
    assert max(matrix.error(one, expected) for one in pool.run(count, shared, "flux", degrees, call)) < matrix.TOLERANCE


@pytest.mark.parametrize(("count", "most"), [(1, 4), (4, 2), (8, 4)])
def test_no_check_takes_more_ranks_than_there_are(monkeypatch, count, most):
    """On machines with so many GPUs, in the short form and the full one."""
    asked = []

    class Pool:
        def __init__(self, size):
            self.size = size

        def run(self, ranks, *job):
            asked.append(ranks)
            assert ranks <= self.size
            return [0.5 if job[0] is speed.hidden else {"seconds": 1.0, "peak": 1, "sent": 1, "element": 2}] * ranks

    monkeypatch.setattr(speed.devices, "device_type", lambda: "cuda")
    pools = ranks.Pools(count, most)
    vars(pools).update(shared=Pool(most), own=Pool(min(most, count)))
    found = [outcome_of(check) for check in speed.checks(pools, most == 2)]
    assert "failed" not in {one.status for one in found} and max(asked) == min(most, count)


def test_diffusers_own_parallelism_opens_on_accelerators(monkeypatch):
    """It divides by their number, which is pretended on the CPU alone."""
    with own_parallelism_runs_here():
        assert torch.accelerator.device_count() == 1
    accelerator.install(monkeypatch, count=4)
    with own_parallelism_runs_here():
        assert torch.accelerator.device_count() == 4


def test_a_peak_of_memory_is_of_one_job(monkeypatch):
    """The ranks of a pool run one job after the other, and a device counts the peak of all of them."""
    asked = accelerator.install(monkeypatch)
    ranks.forget()
    assert devices.peak_memory() == 0 and [name for name, *_ in asked] == [
        "reset_peak_memory_stats",
        "max_memory_allocated",
    ]
