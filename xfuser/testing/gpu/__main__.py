"""``python -m xfuser.testing.gpu``: run all checks that require GPUs, and print a report in Markdown."""

import argparse
import importlib.util
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from functools import partial

import torch

from xfuser.core import device as devices
from xfuser.core.logger import logger
from xfuser.testing.gpu import kernels, speed
from xfuser.testing.gpu.ranks import Pools, checks as checks_of_ranks, quiet
from xfuser.testing.gpu.report import Check, outcome_of, render

PLAN, CALIBRATE = ("plan", "--world_size", "2"), ("plan", "--calibrate")  # arguments of xdit
BENCH = ("bench", "--case", "tiny-joint", "--rounds", "1")
PATIENCE = 120  # seconds


def main() -> int:
    """Run all checks, print the report, and return the exit code: 1 if a check failed."""
    parser = argparse.ArgumentParser(prog="python -m xfuser.testing.gpu", description=__doc__)
    parser.add_argument("--device", choices=("auto", "cpu"), default="auto", help="cpu ignores accelerators")
    parser.add_argument("--short", action="store_true", help="run only a few checks of each kind (half a minute)")
    asked = parser.parse_args()
    if asked.device == "cpu":
        devices.hide()
    logger.setLevel("ERROR")  # the checks also ask kernels for inputs that they do not support
    quiet()
    torch.backends.cudnn.allow_tf32 = False
    accelerated = devices.device_type() != "cpu"
    pools = Pools(torch.accelerator.device_count() if accelerated else 0, 2 if asked.short else 4)
    outcomes = []
    try:
        for check in _checks(pools, asked.short):
            outcomes.append(one := outcome_of(check))
            print(f"{one.status:8} {check.path}: {check.name} ({one.seconds:.1f} s)", file=sys.stderr, flush=True)
    finally:
        pools.close()
    print(render(outcomes, accelerated))
    return int(any(outcome.status == "failed" for outcome in outcomes))


def _checks(pools: Pools, short: bool) -> Iterator[Check]:
    yield from kernels.checks(short)
    yield from checks_of_ranks(pools, short)
    yield from speed.checks(pools, short)
    left_out = "skipped in the short form" if short else None
    yield Check("commands", "xdit plan", partial(_xdit, PLAN), left_out)
    own = devices.device_type() != "cpu"  # each rank has its own device
    plots = None if importlib.util.find_spec("matplotlib") else 'requires pip install "xfuser[bench]"'
    with tempfile.TemporaryDirectory() as folder:
        kept = {"XFUSER_CACHE": folder}  # do not write to the user's machines
        yield Check("commands", "xdit plan --calibrate", partial(_xdit, CALIBRATE, **kept), left_out)
        run = partial(_xdit, (*BENCH, "--output_dir", folder))
        yield Check("commands", "xdit bench", run, left_out or plots or pools.missing(own, 2))


def _xdit(command: tuple[str, ...], **environment: str) -> str:
    """Run an xdit command and return the last lines of its output."""
    called = [sys.executable, "-m", "xfuser.cli", *command]
    done = subprocess.run(called, capture_output=True, text=True, timeout=PATIENCE, env=os.environ | environment)
    if done.returncode:
        raise AssertionError((done.stderr.strip().splitlines() or ["it printed nothing"])[-1])
    return "; ".join(done.stdout.strip().splitlines()[-3:])


if __name__ == "__main__":
    sys.exit(main())
