"""A fake accelerator for machines without one: it records the calls to it, in order."""

import os
import types

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

BYTES, NAME = 2 << 30, "a pretended GPU"


def install(monkeypatch, count=4):
    """Make torch report ``count`` accelerators; return the list of calls that touch one, and of groups that start."""
    asked = []

    def touch(name, result=None):
        def called(*args):
            asked.append((name, *args))
            return result

        return called

    def start(backend, init_method=None, store=None, rank=-1, world_size=-1, **options):
        if backend == "fake":
            return made(backend, store=store, rank=rank, world_size=world_size)
        asked.append(("init_process_group", backend, options))
        ranks = int(os.environ["WORLD_SIZE"]) if world_size == -1 else world_size
        return made("fake", store=FakeStore(), rank=int(os.environ["RANK"]) if rank == -1 else rank, world_size=ranks)

    made = dist.init_process_group
    module = types.SimpleNamespace(
        mem_get_info=touch("mem_get_info", (BYTES // 2, BYTES)),
        get_device_properties=lambda: types.SimpleNamespace(total_memory=BYTES),  # needs no context
        get_device_name=lambda: NAME,
        get_rng_state=touch("get_rng_state", torch.get_rng_state()),
        set_rng_state=touch("set_rng_state"),
        max_memory_allocated=touch("max_memory_allocated", 0),
        memory_reserved=touch("memory_reserved", BYTES // 4),
        memory_allocated=touch("memory_allocated", BYTES // 8),
        reset_peak_memory_stats=touch("reset_peak_memory_stats"),
    )
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("cuda"))
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: count)
    monkeypatch.setattr(torch.accelerator, "set_device_index", touch("set_device_index"))
    monkeypatch.setattr(torch.accelerator, "synchronize", touch("synchronize"))
    monkeypatch.setattr(torch, "get_device_module", lambda kind=None: module)
    monkeypatch.setattr(dist, "init_process_group", start)
    return asked
