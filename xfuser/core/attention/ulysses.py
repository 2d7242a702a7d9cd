"""Ulysses: an all-to-all turns a shard of the tokens with all heads into all tokens with a share of the heads.

DeepSpeed Ulysses, arXiv 2309.14509; here tokens and heads may both be split unevenly.
"""

from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from xfuser.core.distributed.utils import split_sizes


@cache
def share_heads(heads: int, kv_heads: int, parts: int) -> tuple[list[int], list[int]]:
    """Number of query heads and of key/value heads per rank; query heads stay with their key/value head."""
    kv = split_sizes(kv_heads, parts)
    return [size * (heads // kv_heads) for size in kv], kv


def scatter_heads(
    tensors: list[Tensor], lengths: list[int], heads: list[list[int]], group: dist.ProcessGroup
) -> list[Tensor]:
    """Turn each ``[B, H, S_local, D]`` into ``[B, H_local, S, D]``, all in one message.

    ``lengths`` are the token counts of the group's ranks; ``heads`` holds, for each tensor, the head counts of the
    ranks. The tensors share B, S_local and D.
    """
    batch, _, tokens, dim = tensors[0].shape
    rank, ranks = group.rank(), len(lengths)
    totals = [sum(counts) for counts in zip(*heads, strict=True)]  # heads per rank, over all tensors
    # Tokens are the first dimension of the message, so that the received parts are already in sequence order.
    if all(len(set(counts)) == 1 for counts in heads):
        shaped = [
            x.view(batch, ranks, counts[0], tokens, dim).permute(1, 3, 0, 2, 4)
            for x, counts in zip(tensors, heads, strict=True)
        ]
        send = torch.cat(shaped, dim=3)
    else:
        chunks = zip(*(x.split(counts, dim=1) for x, counts in zip(tensors, heads, strict=True)), strict=True)
        send = torch.cat([torch.cat(own, dim=1).permute(2, 0, 1, 3).reshape(-1) for own in chunks])
    received = send.new_empty(sum(lengths), batch, totals[rank], dim)
    row = batch * dim
    dist.all_to_all_single(
        received.view(-1),
        send.view(-1),
        [length * row * totals[rank] for length in lengths],
        [tokens * row * total for total in totals],
        group=group,
    )
    return [x.permute(1, 2, 0, 3) for x in received.split([counts[rank] for counts in heads], dim=2)]


def gather_heads(x: Tensor, lengths: list[int], heads: list[int], group: dist.ProcessGroup) -> Tensor:
    """Turn ``[B, H_local, S, D]`` back into ``[B, H, S_local, D]``, a view of memory ``[B, S_local, H, D]``."""
    batch, mine, _, dim = x.shape
    tokens = lengths[group.rank()]
    send = x.permute(2, 0, 1, 3).contiguous()
    counts = [tokens * batch * count * dim for count in heads]
    received = x.new_empty(sum(counts))
    dist.all_to_all_single(
        received, send.view(-1), counts, [length * batch * mine * dim for length in lengths], group=group
    )
    if len(set(heads)) == 1:
        whole = received.view(len(heads), tokens, batch, mine, dim).permute(2, 1, 0, 3, 4)
        return whole.reshape(batch, tokens, sum(heads), dim).transpose(1, 2)
    parts = [
        part.view(tokens, batch, count, dim).permute(1, 0, 2, 3)
        for part, count in zip(received.split(counts), heads, strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)
