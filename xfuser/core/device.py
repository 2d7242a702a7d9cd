"""The only module that determines this machine's device and communication backend."""

import multiprocessing
import os
import platform
import resource
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

MOST_PROCESSES = 64  # ranks that are started on one machine without accelerators
_spared = False  # True while this process computes on the CPU only, within ``on_cpu()``


@contextmanager
def on_cpu() -> Iterator[None]:
    """Within the context, ranks run on the CPU. The accelerator is not selected, and only its type is queried.

    A process that has selected or used an accelerator holds memory on it until the process ends.
    """
    global _spared
    before, _spared = _spared, True
    try:
        yield
    finally:
        _spared = before


def hide() -> None:
    """Hide accelerators from this process and its child processes. Call this before anything queries them."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def preload(*modules: str) -> None:
    """Have multiprocessing's fork server import these modules before it forks, if it has not started yet.

    With an accelerator, nothing is preloaded: its state does not survive a fork once a library has queried it.
    """
    multiprocessing.set_forkserver_preload(list(modules) if device_type() == "cpu" else [])


def _working_type() -> str:
    return "cpu" if _spared else device_type()


def device_type() -> str:
    """Torch's name for the accelerator's type; ``"cpu"`` without an accelerator."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator else "cpu"


def device_name() -> str:
    """The name of this machine's accelerator or, without one, of its processor."""
    if device_type() != "cpu":
        return torch.get_device_module(device_type()).get_device_name()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def device_count() -> int:
    """Number of accelerators of this machine; 1 without any."""
    return max(1, torch.accelerator.device_count()) if device_type() != "cpu" else 1


def check_ranks(ranks: int) -> None:
    """Raise a ValueError for more ranks on this machine than accelerators, or than the launcher can start.

    NCCL refuses two ranks on one accelerator; Python's fork server passes on at most 256 descriptors.
    """
    if device_type() == "cpu" and ranks > MOST_PROCESSES:
        raise ValueError(f"{ranks} ranks on one machine: at most {MOST_PROCESSES} are supported; give smaller degrees")
    if device_type() != "cpu" and ranks > device_count():
        raise ValueError(f"{ranks} ranks need as many accelerators (here: {device_count()}): give smaller degrees")


def device(local_rank: int) -> torch.device:
    """The device of the rank with this index on its node; the CPU without an accelerator."""
    kind = _working_type()
    return torch.device(kind) if kind == "cpu" else torch.device(kind, local_rank % torch.accelerator.device_count())


def backend() -> str:
    """The default torch.distributed backend for this machine's device: nccl on CUDA, gloo on the CPU."""
    return torch.distributed.get_default_backend_for_device(device_type())


def nccl_version() -> str | None:
    """The NCCL version that torch was built with; None without NCCL."""
    if not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def group_options(local_rank: int, backend_name: str) -> dict[str, torch.device]:
    """Keyword arguments by which ``init_process_group`` binds the device's own backend to this rank's device."""
    if _working_type() == "cpu" or backend_name != backend():
        return {}
    return {"device_id": device(local_rank)}


def use(local_rank: int) -> None:
    """Make this rank's device the current one; does nothing on the CPU."""
    if _working_type() != "cpu":
        torch.accelerator.set_device_index(device(local_rank).index)


def has_architecture(least: tuple[int, int], before: tuple[int, int] | None = None) -> bool:
    """Whether the device's CUDA compute capability is at least ``least`` and, if given, lower than ``before``; True for
    other accelerators."""
    module = torch.get_device_module(device_type())
    has = module.get_device_capability() if hasattr(module, "get_device_capability") else None
    return not isinstance(has, tuple) or (has >= least and (before is None or has < before))


def synchronize() -> None:
    """Wait for the device's queued work; does nothing on the CPU."""
    if _working_type() != "cpu":
        torch.accelerator.synchronize()


def seconds_of(action: Callable[[], Any], times: int = 5, least: float = 0.0) -> float:
    """Median seconds of ``action``, including the device work that it queues.

    It runs ``times`` times, and then until the runs take ``least`` seconds in total. If ranks must run the action
    equally often, ``least`` must be 0.
    """
    found: list[float] = []
    while len(found) < times or sum(found) < least:
        synchronize()
        start = time.perf_counter()
        action()
        synchronize()
        found.append(time.perf_counter() - start)
    return statistics.median(found)


def default_dtype() -> torch.dtype:
    """The default dtype of a loaded pipeline: bfloat16 on an accelerator, float32 on the CPU."""
    return torch.float32 if device_type() == "cpu" else torch.bfloat16


def rng_states() -> list[torch.Tensor]:
    """States of the default random generators as byte tensors: the CPU's, then the accelerator's."""
    states = [torch.get_rng_state()]
    if _working_type() != "cpu":
        states.append(torch.get_device_module(device_type()).get_rng_state())
    return states


def set_rng_states(states: list[torch.Tensor]) -> None:
    """Restore the states that :func:`rng_states` returned on this or another rank."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(device_type()).set_rng_state(states[1])


def peak_memory() -> int:
    """Peak memory in bytes: allocated by torch on an accelerator, resident (RSS) on the CPU."""
    if _working_type() != "cpu":
        return torch.get_device_module(device_type()).max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def restart_peak_memory() -> None:
    """Count :func:`peak_memory` from here on; does nothing on the CPU, whose peak is that of the process."""
    if _working_type() != "cpu":
        torch.get_device_module(device_type()).reset_peak_memory_stats()


def total_memory() -> int | None:
    """The accelerator's memory in bytes; None without an accelerator, as ranks then share the machine's memory."""
    if device_type() == "cpu":
        return None
    return torch.get_device_module(device_type()).get_device_properties().total_memory  # creates no context on it


def free_memory() -> int:
    """Bytes that can be allocated now: on the accelerator or, on the CPU, in the machine's memory."""
    if _working_type() != "cpu":
        module = torch.get_device_module(device_type())
        # What torch's allocator keeps of freed tensors is in use to the device, but not to the next tensor.
        return module.mem_get_info()[0] + module.memory_reserved() - module.memory_allocated()
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
