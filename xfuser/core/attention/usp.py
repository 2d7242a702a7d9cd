"""Unified sequence parallelism: Ulysses inside, ring outside (arXiv 2405.07719)."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from xfuser.core.attention.kernels import attention
from xfuser.core.attention.ring import ring_attention, with_joint
from xfuser.core.attention.ulysses import gather_heads, scatter_heads, share_heads
from xfuser.core.distributed import SequenceParallelGroupCoordinator
from xfuser.core.distributed.group_coordinator import gather_together


@dataclass(frozen=True)
class Joint:
    """Tokens that every rank of the sequence group holds, and that take part in attention once (usually text).

    Attributes:
        q: ``[B, H, Tq, D]``.
        k, v: ``[B, H, T, D]``, with as many heads as the sequence's keys and values.
        front: whether they come before the sequence or after it.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    front: bool


def usp_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    group: SequenceParallelGroupCoordinator,
    *,
    query_lengths: list[int] | None = None,
    mask: Tensor | None = None,
    pair_mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    renew: Callable[..., tuple] | None = None,
    causal: bool = False,
    joint: Joint | None = None,
) -> Tensor:
    """Attention of this rank's queries to the keys of all ranks of the sequence group.

    Args:
        q, k, v: this rank's tokens, ``[B, H, S_local, D]``; k and v may have fewer heads (grouped queries).
        lengths: number of keys of every rank of the sequence group; any counts, including zero.
        query_lengths: number of queries of every rank, if it differs from that of keys.
        mask: additive mask of this rank's own keys, ``[B|1, H|1, 1, S_local]``.
        pair_mask: instead of ``mask``, one over the queries of this rank's Ulysses group and the keys of all ranks, in
            rank order, ``[B|1, H|1, 1|Sq, Sk]``; with ``renew``, over the keys that it returns.
        renew: takes keys, values and mask of the group's tokens in rank order (k and v of this rank's Ulysses heads),
            and returns those to attend to. Keys and values are gathered over the ring first.
        causal: the shards form one sequence in rank order; a token attends to itself and to earlier ones. Not supported
            with ``mask``, ``renew`` or ``joint``.
        joint: tokens that take part in addition to the sequence's. Not supported with ``mask`` or ``renew``.

    Returns:
        ``[B, H, S_local, Dv]``; with ``joint``, its ``Tq`` tokens before or after them, on every rank.
    """
    ulysses, ring = group.ulysses_world_size, group.ring_world_size
    mask = group.all_gather(mask, dim=-1, sizes=lengths) if mask is not None else pair_mask
    blocks = [lengths[i : i + ulysses] for i in range(0, len(lengths), ulysses)]
    own, own_queries = blocks[group.ring_rank], [(query_lengths or lengths)[rank] for rank in group.ulysses_block]
    q_heads, kv_heads = share_heads(q.shape[1], k.shape[1], ulysses)
    if ulysses > 1:
        q, k, v = _scatter([q, k, v], [own_queries, own, own], [q_heads, kv_heads, kv_heads], group.ulysses_group)
        mask = _own_heads(mask, q_heads, group.ulysses_rank)
    totals = [sum(block) for block in blocks]
    beside = None
    if joint:
        shares = zip((joint.q, joint.k, joint.v), (q_heads, kv_heads, kv_heads), strict=True)
        joint_q, *beside = (x.split(heads, dim=1)[group.ulysses_rank] for x, heads in shares)
        q = torch.cat([q, joint_q], dim=2)
    if renew:
        if ring > 1:
            k, v = gather_together(k, v, 2, totals, group.ring_group)
        out = attention(q, *renew(k, v, mask), scale, backend)
    elif ring > 1:
        masks = None if mask is None else list(mask.split(totals, dim=-1))
        out, _ = ring_attention(
            q, k, v, totals, group.ring_group, masks=masks, scale=scale, backend=backend, causal=causal, joint=beside,
            with_lse=False,
        )  # fmt: skip
    else:
        out = attention(q, *with_joint(k, v, beside), mask, scale, backend, causal)
    if joint:
        out, own_queries = _beside_each_share(out, own_queries, joint)
    if ulysses > 1:
        out = gather_heads(out, own_queries, q_heads, group.ulysses_group)
    return out


def _scatter(
    tensors: list[Tensor], lengths: list[list[int]], heads: list[list[int]], group: dist.ProcessGroup
) -> list[Tensor]:
    """As ``scatter_heads``, for tensors of different lengths and head sizes: one message for each set of equal ones."""
    alike: dict[tuple, list[int]] = {}
    for i, (x, counts) in enumerate(zip(tensors, lengths, strict=True)):
        alike.setdefault((x.shape[-1], *counts), []).append(i)
    result = list(tensors)
    for places in alike.values():
        whole = scatter_heads([tensors[i] for i in places], lengths[places[0]], [heads[i] for i in places], group)
        for i, x in zip(places, whole, strict=True):
            result[i] = x
    return result


def _beside_each_share(out: Tensor, lengths: list[int], joint: Joint) -> tuple[Tensor, list[int]]:
    """Repeat the joint tokens, last in ``out``, next to every rank's shard, so that one message sends them to all."""
    count = joint.q.shape[2]
    *shares, rows = out.split([*lengths, count], dim=2)
    pairs = [(rows, share) if joint.front else (share, rows) for share in shares]
    return torch.cat([part for pair in pairs for part in pair], dim=2), [length + count for length in lengths]


def _own_heads(mask: Tensor | None, heads: list[int], rank: int) -> Tensor | None:
    if mask is None or mask.shape[1] == 1:
        return mask
    return mask.split(heads, dim=1)[rank]
