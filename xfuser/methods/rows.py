"""Splitting a call by rows of its batch: what data and batched CFG parallelism have in common."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map_only

from xfuser.core.distributed import GroupCoordinator
from xfuser.core.distributed.utils import share, split_sizes


def split_rows(
    group: GroupCoordinator,
    rows: int,
    call: Callable[[dict[str, Any]], Any],
    arguments: dict[str, Any],
    unbatched: tuple[str, ...] = (),
) -> Any:
    """Run ``call`` on this rank's share of the batch, and return the output of the whole batch.

    Every tensor among the arguments whose first dimension is ``rows`` long is cut, but for those of the arguments
    named in ``unbatched``; every tensor of the output is gathered along its first dimension. ``rows`` need not
    divide by the group; ranks left without a row compute the first one and give nothing.
    """
    if group.world_size == 1 or rows < 2:
        return call(arguments)
    sizes = split_sizes(rows, group.world_size)
    mine = share(sizes, group.rank_in_group)
    computed = mine or range(1)

    def cut(x: torch.Tensor) -> torch.Tensor:
        return x[computed.start : computed.stop] if x.dim() and x.shape[0] == rows else x

    local = {
        name: value if name in unbatched else tree_map_only(torch.Tensor, cut, value)
        for name, value in arguments.items()
    }
    return tree_map_only(torch.Tensor, lambda x: group.all_gather(x[: len(mine)], dim=0, sizes=sizes), call(local))
