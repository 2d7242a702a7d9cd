"""The one place that knows which device and which communication backend this machine has."""

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

_spared = False  # whether the accelerator is left alone, for all that this process computes


@contextmanager
def on_cpu() -> Iterator[None]:
    """Within the context, ranks work on the CPU: the accelerator is neither chosen nor asked for anything but its type.

    An accelerator that a process has chosen, or computed on, keeps memory for it until that process ends.
    """
    global _spared
    before, _spared = _spared, True
    try:
        yield
    finally:
        _spared = before


def hide() -> None:
    """Leave accelerators out in this process and those that it starts; to be called before anything asks for one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""


def preload(*modules: str) -> None:
    """Let processes of multiprocessing's fork server, if it is still to start, be forked with these modules imported.

    Not where there is an accelerator, which does not outlive a fork if a library has looked at it.
    """
    multiprocessing.set_forkserver_preload(list(modules) if device_type() == "cpu" else [])


def _working_type() -> str:
    return "cpu" if _spared else device_type()


def device_type() -> str:
    """The accelerator's type as torch names it, or ``"cpu"`` where there is none."""
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return accelerator.type if accelerator else "cpu"


def device_name() -> str:
    """What this machine's device is called: the accelerator, or the processor."""
    if device_type() != "cpu":
        return torch.get_device_module(device_type()).get_device_name()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            return next(line.partition(":")[2].strip() for line in file if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def device_count() -> int:
    """Accelerators of this machine; 1 where there is none."""
    return max(1, torch.accelerator.device_count()) if device_type() != "cpu" else 1


def device(local_rank: int) -> torch.device:
    """The device of the rank with this index on its node; the CPU where there is no accelerator."""
    kind = _working_type()
    return torch.device(kind) if kind == "cpu" else torch.device(kind, local_rank % torch.accelerator.device_count())


def backend() -> str:
    """The torch.distributed backend of this machine's device: nccl on CUDA, gloo on the CPU."""
    return torch.distributed.get_default_backend_for_device(device_type())


def nccl_version() -> str | None:
    """The release of NCCL that torch was built with; None without it."""
    if not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def group_options(local_rank: int, backend_name: str) -> dict[str, torch.device]:
    """Keywords of ``init_process_group`` by which a device's own backend knows the device of this rank."""
    if _working_type() == "cpu" or backend_name != backend():
        return {}
    return {"device_id": device(local_rank)}


def use(local_rank: int) -> None:
    """Make this rank's device the current one (nothing to do on the CPU)."""
    if _working_type() != "cpu":
        torch.accelerator.set_device_index(device(local_rank).index)


def has_architecture(least: tuple[int, int], before: tuple[int, int] | None = None) -> bool:
    """Whether the device has this CUDA architecture (compute capability) or a later one, but one ``before`` another;
    true of other accelerators."""
    module = torch.get_device_module(device_type())
    has = module.get_device_capability() if hasattr(module, "get_device_capability") else None
    return not isinstance(has, tuple) or (has >= least and (before is None or has < before))


def synchronize() -> None:
    """Wait for the device's queued work (the CPU has none)."""
    if _working_type() != "cpu":
        torch.accelerator.synchronize()


def seconds_of(action: Callable[[], Any], times: int = 5, least: float = 0.0) -> float:
    """Seconds of an action with the work that it queues: the median of so many, or of more that take ``least`` in all.

    For what ranks must do equally often, ``least`` is 0.
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
    """What a pipeline is loaded in when nothing is asked: bfloat16 on an accelerator, float32 on the CPU."""
    return torch.float32 if device_type() == "cpu" else torch.bfloat16


def rng_states() -> list[torch.Tensor]:
    """States of the default random generators, as byte tensors: the CPU's, then the accelerator's."""
    states = [torch.get_rng_state()]
    if _working_type() != "cpu":
        states.append(torch.get_device_module(device_type()).get_rng_state())
    return states


def set_rng_states(states: list[torch.Tensor]) -> None:
    """Put back what :func:`rng_states` returned (here or on another rank)."""
    torch.set_rng_state(states[0])
    if len(states) > 1:
        torch.get_device_module(device_type()).set_rng_state(states[1])


def peak_memory() -> int:
    """Bytes at the high-water mark: allocated by torch on an accelerator, resident (RSS) on the CPU."""
    if _working_type() != "cpu":
        return torch.get_device_module(device_type()).max_memory_allocated()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def total_memory() -> int | None:
    """Bytes that the accelerator has; None where there is none, as ranks then share what the machine has."""
    if device_type() == "cpu":
        return None
    return torch.get_device_module(device_type()).get_device_properties().total_memory  # needs no context on it


def free_memory() -> int:
    """Bytes that can be allocated now: of the accelerator, or of the machine's memory on the CPU."""
    if _working_type() != "cpu":
        return torch.get_device_module(device_type()).mem_get_info()[0]
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
