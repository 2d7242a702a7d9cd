"""Unified sequence parallelism: Ulysses inside, ring outside (arXiv 2405.07719)."""

from collections.abc import Callable

import torch

from xfuser.core.attention.kernels import attention
from xfuser.core.attention.ring import ring_attention
from xfuser.core.attention.ulysses import gather_heads, scatter_heads, share_heads
from xfuser.core.distributed import SequenceParallelGroupCoordinator
from xfuser.core.distributed.group_coordinator import gather_together


def usp_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    lengths: list[int],
    group: SequenceParallelGroupCoordinator,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    renew: Callable[..., tuple] | None = None,
) -> torch.Tensor:
    """Attention of this rank's queries to the keys of all ranks of the sequence group.

    Args:
        q, k, v: this rank's rows, ``[B, H, S_local, D]``; k and v may have fewer heads (grouped queries).
        lengths: rows of every rank of the sequence group; any counts, zero too.
        mask: additive mask of this rank's own keys, ``[B|1, H|1, 1, S_local]``.
        renew: takes keys, values and mask of the group's rows in rank order (k and v of this rank's Ulysses heads),
            and returns those to attend to. Keys and values are then gathered around the ring beforehand.

    Returns:
        ``[B, H, S_local, Dv]``.
    """
    ulysses, ring = group.ulysses_world_size, group.ring_world_size
    if mask is not None:
        mask = group.all_gather(mask, dim=-1, sizes=lengths)
    blocks = [lengths[i : i + ulysses] for i in range(0, len(lengths), ulysses)]
    own = blocks[group.ring_rank]
    q_heads, kv_heads = share_heads(q.shape[1], k.shape[1], ulysses)
    if ulysses > 1:
        if q.shape[-1] == v.shape[-1]:
            q, k, v = scatter_heads([q, k, v], own, [q_heads, kv_heads, kv_heads], group.ulysses_group)
        else:
            q, k = scatter_heads([q, k], own, [q_heads, kv_heads], group.ulysses_group)
            (v,) = scatter_heads([v], own, [kv_heads], group.ulysses_group)
        mask = _own_heads(mask, q_heads, group.ulysses_rank)
    totals = [sum(block) for block in blocks]
    if renew:
        if ring > 1:
            k, v = gather_together(k, v, 2, totals, group.ring_group)
        out = attention(q, *renew(k, v, mask), scale, backend)
    elif ring > 1:
        masks = None if mask is None else list(mask.split(totals, dim=-1))
        out = ring_attention(q, k, v, totals, group.ring_group, masks=masks, scale=scale, backend=backend)
    else:
        out = attention(q, k, v, mask, scale, backend)
    if ulysses > 1:
        out = gather_heads(out, own, q_heads, group.ulysses_group)
    return out


def _own_heads(mask: torch.Tensor | None, heads: list[int], rank: int) -> torch.Tensor | None:
    if mask is None or mask.shape[1] == 1:
        return mask
    return mask.split(heads, dim=1)[rank]
