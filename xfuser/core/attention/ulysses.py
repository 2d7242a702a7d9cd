"""Ulysses: an all-to-all turns a share of the tokens with all heads into all tokens with a share of the heads.

DeepSpeed Ulysses, arXiv 2309.14509; here tokens and heads may both be split unevenly.
"""

import torch
import torch.distributed as dist

from xfuser.core.distributed.utils import split_sizes


def share_heads(heads: int, kv_heads: int, parts: int) -> tuple[list[int], list[int]]:
    """Query and key/value heads of each rank; query heads stay with the key/value head that they use."""
    kv = split_sizes(kv_heads, parts)
    return [size * (heads // kv_heads) for size in kv], kv


class HeadScatter:
    """``[B, H, S_local, D]`` to ``[B, H_local, S, D]``: starts at once, ``wait()`` gives the result.

    ``lengths`` are the token counts of the group's ranks, ``heads`` the head counts that they get.
    """

    def __init__(self, x: torch.Tensor, lengths: list[int], heads: list[int], group: dist.ProcessGroup) -> None:
        batch, _, tokens, dim = x.shape
        mine = heads[dist.get_rank(group)]
        # On the wire tokens come first, so that what arrives from the ranks is already in sequence.
        send = x.new_empty(x.numel())
        counts = [tokens * batch * count * dim for count in heads]
        for part, chunk, count in zip(send.split(counts), x.split(heads, dim=1), heads, strict=True):
            part.view(tokens, batch, count, dim).copy_(chunk.permute(2, 0, 1, 3))
        self._send = send
        self._received = x.new_empty(sum(lengths), batch, mine, dim)
        self._work = dist.all_to_all_single(
            self._received.view(-1),
            send,
            [length * batch * mine * dim for length in lengths],
            counts,
            group=group,
            async_op=True,
        )

    def wait(self) -> torch.Tensor:
        self._work.wait()
        del self._send
        return self._received.permute(1, 2, 0, 3)


def gather_heads(x: torch.Tensor, lengths: list[int], heads: list[int], group: dist.ProcessGroup) -> torch.Tensor:
    """``[B, H_local, S, D]`` back to ``[B, H, S_local, D]``; the memory behind it is ``[B, S_local, H, D]``."""
    batch, mine, _, dim = x.shape
    tokens = lengths[dist.get_rank(group)]
    send = x.permute(2, 0, 1, 3).contiguous()
    counts = [tokens * batch * count * dim for count in heads]
    received = x.new_empty(sum(counts))
    dist.all_to_all_single(
        received, send.view(-1), counts, [length * batch * mine * dim for length in lengths], group=group
    )
    parts = [
        part.view(tokens, batch, count, dim).permute(1, 0, 2, 3)
        for part, count in zip(received.split(counts), heads, strict=True)
    ]
    return torch.cat(parts, dim=2).transpose(1, 2)
