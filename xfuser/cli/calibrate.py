"""``xdit plan --calibrate``: measure this machine on all of its ranks, and store the results."""

import os

from xfuser.core import device as devices
from xfuser.core.distributed import destroy_distributed_environment, get_world_group, init_distributed_environment

LEAST = 2  # ranks on a CPU: links are measured between two ranks


def run(arguments: list[str]) -> int:
    """Launch the ranks, or, on a launched rank, run its part; returns the exit code."""
    if "RANK" not in os.environ:
        from xfuser.cli.main import launch

        least = LEAST if devices.device_type() == "cpu" else 1  # each rank has its own accelerator
        return launch(max(least, devices.device_count()), ["plan", *arguments])
    from xfuser.planner.calibrate import measure
    from xfuser.planner.machines import keep

    init_distributed_environment()
    machine = measure()
    if get_world_group().is_first_rank:
        path, known = keep(machine), machine.constants
        print(
            f"{machine.name}, {get_world_group().world_size} ranks at once: matrix products {machine.peak / 1e9:.4g}"
            f" GFLOP/s, of convolutions"
            f" {known.convolution:.0%} of it, attention {machine.kernels * machine.peak / 1e9:.4g} GFLOP/s,"
            f" memory {machine.bandwidth / 1e9:.3g} GB/s, host {known.host * 1e6:.3g} us an operator,"
            f" link {machine.link / 1e9:.3g} GB/s behind {known.start * 1e6:.3g} us"
        )
        print(path)
    destroy_distributed_environment()
    return 0
