"""Teams: the world divided into parts of equally many consecutive ranks, each with its own process groups.

All groups are made before they are used. A rank is in one team of each size, and enters the one that it computes with.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from xfuser.core.distributed.group_coordinator import GroupCoordinator
from xfuser.core.distributed.parallel_state import _groups, get_world_group, initialize_model_parallel

Groups = dict[str, GroupCoordinator]


def form_teams(size: int, **degrees: int) -> Groups:
    """Make the groups of this rank's team of ``size`` ranks, which must divide the world size; all ranks must call it.

    ``degrees`` are those of :func:`initialize_model_parallel`. A team of all ranks uses the existing groups.
    """
    world = get_world_group()
    if size == world.world_size:
        return dict(_groups)
    teams = [list(range(first, first + size)) for first in range(0, world.world_size, size)]
    with in_team({"world": GroupCoordinator(teams, world.local_rank, dist.get_backend())}):
        initialize_model_parallel(**degrees)
        return dict(_groups)


@contextmanager
def in_team(groups: Groups) -> Iterator[None]:
    """Within the context, ``groups`` are the process groups of this rank, and the team is its world."""
    own = dict(_groups)
    _groups.clear()
    _groups.update(groups)
    try:
        yield
    finally:
        _groups.clear()
        _groups.update(own)
