"""Ring attention: key/value blocks travel around the ring while each rank attends to the block that it holds.

Ring Attention, arXiv 2310.01889; partial results are merged by their log-sum-exp (LSE).
"""

import math
from functools import reduce

import torch
import torch.distributed as dist
from torch import Tensor

from xfuser.core.attention.kernels import attention_with_lse, wide

UNMERGED = 4  # partial results held at most: merging several at once takes fewer operators than one after the other


def ring_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: list[int],
    group: dist.ProcessGroup,
    *,
    masks: list[Tensor] | None = None,
    scale: float | None = None,
    backend: str = "auto",
    causal: bool = False,
    joint: tuple[Tensor, Tensor] | None = None,
    with_lse: bool = True,
) -> tuple[Tensor, Tensor | None]:
    """Attention of this rank's queries to the keys of the whole ring.

    Args:
        q, k, v: this rank's tokens, ``[B, H, S_local, D]``.
        lengths: number of keys of each ring rank.
        masks: the additive mask of each ring rank's block of keys, ``[B|1, H|1, 1|S_local, length]``.
        causal: the blocks form one sequence in rank order; a token attends to itself and to earlier ones. Not supported
            with ``masks`` or ``joint``.
        joint: keys and values ``[B, H, T, D]`` that every rank holds, in addition to the ring's. Not supported with
            ``masks``.
        with_lse: whether the LSE is needed.

    Returns:
        ``[B, H, S_local, Dv]`` in q's dtype, accumulated in the dtype of :func:`wide`, and the LSE ``[B, H, S_local]``,
        which may be None without ``with_lse``.
    """
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    parts: list[Tensor] = []
    held = torch.cat([k.reshape(-1), v.reshape(-1)]) if size > 1 else None
    for step in range(size):
        owner = (rank - step) % size
        coming = _Shift(held, k, v, lengths[(owner - 1) % size], group) if step + 1 < size else None
        keys, values = with_joint(k, v, joint if step == 0 else None)  # every rank holds a copy, so they do not travel
        if keys.shape[2] and q.numel() and not (causal and owner > rank):
            mask = masks[owner] if masks else None
            parts += attention_with_lse(q, keys, values, mask, scale, backend, causal and owner == rank)
            if len(parts) == 2 * UNMERGED:
                parts = [*merge(*parts)]
        if coming:
            held, k, v = coming.wait()
    if not parts:
        return q.new_zeros(*q.shape[:3], v.shape[-1]), q.new_full(q.shape[:3], -torch.inf, dtype=wide(q))
    out, lse = merge(*parts, with_lse=with_lse)
    return out.to(q.dtype), lse


def with_joint(k: Tensor, v: Tensor, joint: tuple[Tensor, Tensor] | None) -> tuple[Tensor, Tensor]:
    """Keys and values ``[B, H, S, D]``, followed by the joint ones if there are any."""
    return (torch.cat([k, joint[0]], dim=2), torch.cat([v, joint[1]], dim=2)) if joint else (k, v)


def merge(*parts: Tensor | None, with_lse: bool = True) -> tuple[Tensor, Tensor | None]:
    """Merge partial attentions over disjoint keys: outputs ``[B, H, S, D]`` and LSEs ``[B, H, S]`` in turn."""
    outs, lses = ([x for x in parts[start::2] if x is not None] for start in (0, 1))
    out, lse = outs[0].to(wide(outs[0])), reduce(torch.logaddexp, lses) if with_lse or len(lses) == 2 else None
    if len(outs) == 1:
        return out, lse
    if len(outs) == 2:
        weight = (lses[1] - lse).exp().nan_to_num(0.0)  # NaN for queries without a key in any block
        return torch.lerp(out, outs[1].to(out.dtype), weight.unsqueeze(-1)), lse
    first, weights = out, torch.stack(lses, -1).softmax(-1).nan_to_num(0.0).split(1, -1)
    for block, weight in zip(outs[1:], weights[1:], strict=True):
        out = torch.addcmul(out, block - first, weight)  # rounds less than a sum of products
    return out, lse


class _Shift:
    """A transfer of K and V to the next rank, and of the previous rank's K and V to this one, each as one message.

    ``held`` is the message to send: this rank's ``k`` and ``v``, flattened and concatenated.
    """

    def __init__(self, held: Tensor, k: Tensor, v: Tensor, incoming_length: int, group: dist.ProcessGroup) -> None:
        ranks, rank = dist.get_process_group_ranks(group), dist.get_rank(group)
        self._shapes = [(*x.shape[:2], incoming_length, x.shape[3]) for x in (k, v)]
        self._counts = [math.prod(shape) for shape in self._shapes]
        self._sent, self._received = held, k.new_empty(sum(self._counts))
        ops = []
        if self._sent.numel():
            ops.append(dist.P2POp(dist.isend, self._sent, ranks[(rank + 1) % len(ranks)], group))
        if self._received.numel():
            ops.append(dist.P2POp(dist.irecv, self._received, ranks[rank - 1], group))
        self._works = dist.batch_isend_irecv(ops) if ops else []

    def wait(self) -> tuple[Tensor, Tensor, Tensor]:
        """The received message, to be sent on as it is, and its K and V."""
        # On NCCL this blocks the compute stream, not the host: attention to these keys, queued after this, starts once
        # they have arrived; attention queued before runs during the transfer. This object keeps the sent buffer alive
        # until then.
        for work in self._works:
            work.wait()
        k, v = self._received.split(self._counts)
        return self._received, k.view(self._shapes[0]), v.view(self._shapes[1])
