"""Splitting a call by entries of its batch: what data and batched CFG parallelism have in common."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map, tree_map_only

from xfuser.call import CallState
from xfuser.core.distributed import GroupCoordinator
from xfuser.core.distributed.utils import share, split_sizes
from xfuser.models.plan import ModelPlan


def split_batch(
    group: GroupCoordinator,
    batch: int,
    forward: Callable[[dict[str, Any]], Any],
    arguments: dict[str, Any],
    plan: ModelPlan | None = None,
    call: CallState | None = None,
) -> Any:
    """Run ``forward`` on this rank's entries of a batch, and return the output of all of it.

    Every tensor among the arguments whose first dimension is ``batch`` long is cut, but where ``plan`` says otherwise;
    every tensor of the output is gathered along its first dimension, and every list. ``batch`` need not divide by the
    group; ranks left without an entry compute the first one and give nothing, which ``call`` is told.
    """
    sizes = split_sizes(batch, group.world_size)
    mine = share(sizes, group.rank_in_group)
    if call and not mine:
        call.gives = False
    if group.world_size == 1 or batch < 2:
        return forward(arguments)
    computed = mine or range(1)

    def gather(x: Any) -> Any:
        x = torch.stack(x) if (listed := isinstance(x, list)) else x
        if not isinstance(x, Tensor):
            return x
        gathered = group.all_gather(x[: len(mine)], dim=0, sizes=sizes)
        return list(gathered) if listed else gathered

    if plan and plan.pictures:
        arguments = _with_pictures_of(arguments, *plan.pictures, computed)
    output = forward({name: _cut(value, name, batch, computed, plan) for name, value in arguments.items()})
    return tree_map(gather, output, is_leaf=lambda x: isinstance(x, list))


def _cut(value: Any, name: str, batch: int, entries: range, plan: ModelPlan | None) -> Any:
    """These entries of the batch of an argument; all of one that has no batch."""
    if plan and name in plan.unbatched:
        return value
    if plan and name in plan.row_lists:
        return value[entries.start : entries.stop] if value is not None and len(value) == batch else value
    dim, by_frame = (plan.batch_dims.get(name, 0), name in plan.by_frame) if plan else (0, False)

    def narrow(x: Tensor) -> Tensor:
        rows = x.shape[dim] if x.dim() > dim else 0
        frames = rows // batch if by_frame else 1
        return x.narrow(dim, frames * entries.start, frames * len(entries)) if rows == frames * batch else x

    return tree_map_only(Tensor, narrow, value)


def _with_pictures_of(arguments: dict[str, Any], places: str, pictures: str, entries: range) -> dict[str, Any]:
    """The arguments with the pictures of these entries alone, which are numbered anew."""
    owners = [entry for entry, own in (arguments.get(places) or {}).items() for _ in own]
    if not owners:
        return arguments
    return arguments | {
        places: {entry - entries.start: own for entry, own in arguments[places].items() if entry in entries},
        pictures: [one for entry, one in zip(owners, arguments[pictures], strict=True) if entry in entries],
    }
