"""Splits a forward by batch entries; used by data parallelism and batched CFG parallelism."""

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
    branches: int = 1,
) -> Any:
    """Run ``forward`` on this rank's batch entries, and return the output for the whole batch.

    Every tensor argument whose first dimension has length ``batch`` is split, unless ``plan`` says otherwise. Every
    tensor of the output is gathered along its first dimension, and so is every list. ``batch`` need not be divisible by
    the group size: a rank without an entry computes the first one, gives nothing, and sets ``call.gives`` to False. The
    batch holds ``branches`` guidance branches one after the other; a rank takes the same entries of each branch.
    """
    count = batch // branches
    sizes = split_sizes(count, group.world_size)
    mine = share(sizes, group.rank_in_group)
    if call and not mine:
        call.gives = False
    if group.world_size == 1 or count < 2:
        return forward(arguments)
    computed = mine or range(1)
    if plan and plan.pictures:
        arguments = _with_pictures_of(arguments, *plan.pictures, computed)
    starts = [branch * count + computed.start for branch in range(branches)]
    output = forward(rows_of(arguments, batch, [range(start, start + len(computed)) for start in starts], plan))
    return gather_rows(group, output, sizes, branches)


def gather_rows(group: GroupCoordinator, output: Any, sizes: list[int], branches: int = 1) -> Any:
    """Gather the output of the whole batch; ``sizes`` counts the rows of each branch that each rank gives."""
    given = sizes[group.rank_in_group]

    def gather(x: Any) -> Any:
        x = torch.stack(x) if (listed := isinstance(x, list)) else x
        if not isinstance(x, Tensor):
            return x
        own = x.unflatten(0, (branches, -1)).transpose(0, 1)[:given].contiguous()
        gathered = group.all_gather(own, dim=0, sizes=sizes).transpose(0, 1).flatten(0, 1)
        return list(gathered) if listed else gathered

    return tree_map(gather, output, is_leaf=lambda x: isinstance(x, list))


def rows_of(arguments: dict[str, Any], batch: int, ranges: list[range], plan: ModelPlan | None) -> dict[str, Any]:
    """The arguments of a forward, cut to these rows of the batch."""
    return {name: _cut(value, name, batch, ranges, plan) for name, value in arguments.items()}


def _cut(value: Any, name: str, batch: int, ranges: list[range], plan: ModelPlan | None) -> Any:
    """An argument, cut to these rows of the batch; unchanged if it has no batch dimension."""
    if plan and name in plan.unbatched:
        return value
    if plan and name in plan.row_lists:
        return [value[row] for rows in ranges for row in rows] if value is not None and len(value) == batch else value
    dim, by_frame = (plan.batch_dims.get(name, 0), name in plan.by_frame) if plan else (0, False)

    def narrow(x: Tensor) -> Tensor:
        count = x.shape[dim] if x.dim() > dim else 0
        frames = count // batch if by_frame else 1
        if count != frames * batch:
            return x
        own = [x.narrow(dim, frames * rows.start, frames * len(rows)) for rows in ranges]
        return own[0] if len(own) == 1 else torch.cat(own, dim)

    return tree_map_only(Tensor, narrow, value)


def _with_pictures_of(arguments: dict[str, Any], places: str, pictures: str, entries: range) -> dict[str, Any]:
    """The arguments with only the input images of these entries; the entries are renumbered from 0."""
    owners = [entry for entry, own in (arguments.get(places) or {}).items() for _ in own]
    if not owners:
        return arguments
    return arguments | {
        places: {entry - entries.start: own for entry, own in arguments[places].items() if entry in entries},
        pictures: [one for entry, one in zip(owners, arguments[pictures], strict=True) if entry in entries],
    }
