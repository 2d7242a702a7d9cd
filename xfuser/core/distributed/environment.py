"""What a launcher such as torchrun tells a rank in its environment, and what callers pass instead, checked."""

import os

import torch.distributed as dist

from xfuser.core.checks import check_count


def number(name: str) -> int | None:
    """An environment variable as a number; None if it is not set, or -1, as some scripts set it without a launcher.

    Raises:
        ValueError: it is not a whole number of 0 or more.
    """
    value = os.environ.get(name)
    if value in (None, "-1"):
        return None
    if not value.isdecimal():
        raise ValueError(f"the environment variable {name}={value!r} must be a whole number of 0 or more")
    return int(value)


def launched() -> tuple[int, int]:
    """World size and rank that the launcher set; 1 and 0 without a launcher.

    Raises:
        ValueError: they are incomplete, or not a rank of that world.
    """
    world_size, rank = number("WORLD_SIZE"), number("RANK")
    if (rank is None) != (world_size is None) and world_size != 1:
        there, lacking = ("WORLD_SIZE", "RANK") if rank is None else ("RANK", "WORLD_SIZE")
        raise ValueError(
            f"the environment variable {there}={os.environ[there]} is set, and {lacking} is not: start the ranks with"
            f" torchrun, which sets both, or unset {there} for a single process"
        )
    world_size, rank = 1 if world_size is None else world_size, rank or 0
    check_place(world_size, rank)
    return world_size, rank


def node_rank(local_rank: int, rank: int) -> int:
    """This process's rank on its node: as passed, as set by the launcher, or its global rank."""
    if local_rank != -1:
        return local_rank
    launchers = number("LOCAL_RANK")
    if launchers is not None:
        return launchers
    if dist.is_initialized():
        return dist.get_rank()
    return number("RANK") or 0 if rank == -1 else rank


def check_place(world_size: int, rank: int, local_rank: int = -1) -> None:
    """Raise a ValueError unless this is a rank of such a world; -1 stands for a value that is not given."""
    for name, value, least in (("world_size", world_size, 1), ("rank", rank, 0), ("local_rank", local_rank, 0)):
        if value != -1:
            check_count(name, value, least)
    if -1 != world_size <= rank:
        raise ValueError(f"rank={rank} must be less than world_size={world_size}")


def check_group_backend(backend: str | None) -> None:
    """Raise a ValueError unless torch knows the backend of process groups; without one, it is the device's own."""
    known, parts = dist.Backend.backend_list, str(backend).lower().split(",")  # one, or one per device type
    if backend and any(part.rpartition(":")[2] not in known for part in parts):
        raise ValueError(f"backend={backend!r} is unknown; known are {', '.join(known)}")
