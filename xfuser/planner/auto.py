"""Choose the parallel degrees of the running ranks by a plan: ``xFuserArgs(auto=True)``.

The first rank plans and broadcasts the result to all ranks. It plans in a subprocess, because a plan initializes a fake
process group, and this process already has a real one.
"""

import json
import os
import subprocess
import sys
from dataclasses import asdict, replace
from typing import Any

from xfuser.config import xFuserArgs
from xfuser.config.args import in_bytes
from xfuser.core import device as devices
from xfuser.core.distributed import get_world_group
from xfuser.core.logger import logger
from xfuser.planner.machines import calibrated, machine_of
from xfuser.planner.report import ranked, why
from xfuser.planner.scale import choices_of
from xfuser.planner.table import plan, with_degrees

LAUNCHED = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "GROUP_RANK", "MASTER_ADDR", "MASTER_PORT")


def chosen(args: xFuserArgs) -> xFuserArgs:
    """Return the arguments with the degrees of the fastest configuration; every rank must call this.

    Raises:
        ValueError: no configuration fits, or the machine is unknown.
    """
    world = get_world_group()
    told = world.broadcast_object(_planned(args, world.world_size) if world.is_first_rank else None)
    if "refused" in told:
        raise ValueError(f"auto: {told['refused']}")
    logger.info("auto: %s", told["reason"])
    if world.is_first_rank:
        print(f"auto: {told['reason']}", flush=True)
    args, degrees = replace(args, auto=False, allow_stale=False), told["degrees"]
    shards = world.world_size // degrees["dp"] if args.fully_shard_degree > 1 else 1
    return with_degrees(replace(args, fully_shard_degree=shards), degrees)


def _planned(args: xFuserArgs, world_size: int) -> dict:
    """Run :func:`main` in a subprocess and return its result."""
    alone = {name: value for name, value in os.environ.items() if name not in LAUNCHED}
    command = [sys.executable, "-m", "xfuser.planner.auto"]
    asked = json.dumps({"args": asdict(args), "ranks": world_size}, default=_plain)
    done = subprocess.run(command, input=asked, capture_output=True, text=True, env=alone, check=False)
    if done.returncode:
        return {"refused": f"the plan failed: {(done.stderr.strip().splitlines() or ['no error'])[-1]}"}
    return json.loads(done.stdout.splitlines()[-1])


def _plain(value: Any) -> Any:
    """A NumPy number or a path as JSON can have it."""
    return value.item() if hasattr(value, "item") else os.fspath(value)


def main() -> None:
    """Read a request from stdin, plan, and print the degrees and their reason, or the error, as JSON."""
    asked = json.load(sys.stdin)
    try:
        told = choice(xFuserArgs(**asked["args"]), asked["ranks"])
    except ValueError as error:
        told = {"refused": str(error)}
    print(json.dumps(told))


def choice(args: xFuserArgs, ranks: int) -> dict:
    """Return the degrees of the fastest configuration for this number of ranks on this machine, and the reason."""
    name = devices.device_name()
    machine = calibrated(name) or machine_of("CPU" if devices.device_type() == "cpu" else name)
    machine = replace(machine, node=int(os.environ.get("LOCAL_WORLD_SIZE", machine.node)))
    stale, compiled = args.allow_stale, args.use_torch_compile
    steps = args.num_inference_steps or xFuserArgs.num_inference_steps
    args = replace(args, auto=False, allow_stale=False, use_torch_compile=False, num_inference_steps=steps)
    memory = in_bytes(args.memory) if args.memory else devices.total_memory()  # not that of a data sheet
    rows = plan(args, ranks, machine, compiled, choices_of(ranks), exact=not stale)
    good, rest = ranked(rows, "latency", memory)
    if not good:
        raise ValueError(
            f"nothing fits {ranks} ranks: " + "; ".join(f"{row.name}: {reason}" for row, reason in rest[:4])
        )
    best = good[0]
    reason = f"{best.name}, {best.seconds:.3g} s predicted on {machine.name}"
    if len(good) > 1:
        reason += f"; next, {good[1].name}: {why(good[1], best, 'latency')}"
    return {"degrees": best.degrees, "reason": reason}


if __name__ == "__main__":
    main()
