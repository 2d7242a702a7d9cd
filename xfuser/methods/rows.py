"""Splitting a call by rows of its batch: what data and batched CFG parallelism have in common."""

from collections.abc import Callable
from typing import Any

import torch
from torch.utils._pytree import tree_map, tree_map_only

from xfuser.core.distributed import GroupCoordinator
from xfuser.core.distributed.utils import share, split_sizes
from xfuser.models.plan import ModelPlan


def split_rows(
    group: GroupCoordinator,
    rows: int,
    call: Callable[[dict[str, Any]], Any],
    arguments: dict[str, Any],
    plan: ModelPlan | None = None,
) -> Any:
    """Run ``call`` on this rank's share of the batch, and return the output of the whole batch.

    Every tensor among the arguments whose first dimension is ``rows`` long is cut, but where ``plan`` says otherwise;
    every tensor of the output is gathered along its first dimension, and every list. ``rows`` need not divide by the
    group; ranks left without a row compute the first one and give nothing.
    """
    if group.world_size == 1 or rows < 2:
        return call(arguments)
    sizes = split_sizes(rows, group.world_size)
    mine = share(sizes, group.rank_in_group)
    computed = mine or range(1)

    def cut(name: str, value: Any) -> Any:
        if plan and name in plan.unbatched:
            return value
        if plan and name in plan.row_lists:
            return value[computed.start : computed.stop] if value is not None and len(value) == rows else value
        dim = plan.batch_dims.get(name, 0) if plan else 0
        return tree_map_only(torch.Tensor, lambda x: _narrow(x, dim), value)

    def _narrow(x: torch.Tensor, dim: int) -> torch.Tensor:
        if x.dim() <= dim or x.shape[dim] != rows:
            return x
        return x.narrow(dim, computed.start, len(computed))

    def gather(x: Any) -> Any:
        if isinstance(x, list):
            return list(group.all_gather(torch.stack(x)[: len(mine)], dim=0, sizes=sizes))
        return group.all_gather(x[: len(mine)], dim=0, sizes=sizes) if isinstance(x, torch.Tensor) else x

    if plan and plan.pictures:
        arguments = _with_pictures_of(arguments, *plan.pictures, computed)
    output = call({name: cut(name, value) for name, value in arguments.items()})
    return tree_map(gather, output, is_leaf=lambda x: isinstance(x, list))


def _with_pictures_of(arguments: dict[str, Any], places: str, pictures: str, rows: range) -> dict[str, Any]:
    """The arguments with the pictures of these rows alone, which are numbered anew."""
    owners = [row for row, own in (arguments.get(places) or {}).items() for _ in own]
    if not owners:
        return arguments
    return arguments | {
        places: {row - rows.start: own for row, own in arguments[places].items() if row in rows},
        pictures: [one for row, one in zip(owners, arguments[pictures], strict=True) if row in rows],
    }
