"""Attention of a sequence whose shares the ranks hold in whichever lengths they like."""

import torch

from xfuser.compat.long_ctx_attention.asked import check_joint, check_tensors
from xfuser.core.attention.kernels import autocast
from xfuser.core.attention.usp import Joint, usp_attention
from xfuser.core.distributed import SequenceParallelGroupCoordinator, get_sp_group
from xfuser.core.distributed.group_coordinator import gather_numbers
from xfuser.core.gradients import forward_only


def attention_of_shares(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    joint: tuple[torch.Tensor | None, ...],
    strategy: str | None,
    heads: int,
    *,
    scale: float | None = None,
    causal: bool = False,
    backend: str = "auto",
) -> torch.Tensor:
    """Attention over the sequence group, of this rank's share of the tokens to all of them.

    Args:
        query, key, value: four dimensions, of which ``heads`` (1 or 2) are the heads, and the other one (2 or 1) the
            tokens; key and value may have fewer heads.
        joint: query, key and value of tokens that every rank holds, or three times None.
        strategy: "front" or "rear", where those tokens are in the result.
        causal: a token attends to itself and to those before it, the shares following one another in rank order.

    Returns:
        In the same layout, this rank's tokens, and the joint ones in front or rear of them.
    """
    query, key, value, *joint = autocast(query, key, value, *joint)
    check_tensors(query, key, value, heads)
    names = ("joint_tensor_query", "joint_tensor_key", "joint_tensor_value")
    like = {"query": query, "key": key, "value": value}
    has_joint = check_joint(dict(zip(names, joint, strict=True)), strategy, like, heads)
    if has_joint and causal:
        raise ValueError("causal=True has no meaning beside joint tensors: remove one of them")
    tokens = 3 - heads
    if query.shape[tokens] != key.shape[tokens]:
        raise ValueError(
            f"query {tuple(query.shape)}, key {tuple(key.shape)}: a rank must hold as many queries as keys"
            f" (dimension {tokens}); tokens that every rank holds go into the joint tensors"
        )
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        group = get_sp_group()
        q, k, v = (x.movedim(heads, 1) for x in (query, key, value))
        rows = Joint(*(x.movedim(heads, 1) for x in joint), front=strategy == "front") if has_joint else None
        lengths = _lengths(group, q, k, rows)
        out = usp_attention(q, k, v, lengths, group, scale=scale, causal=causal, backend=backend, joint=rows)
    return forward_only(out, query, key, value, *joint).movedim(1, heads)


def _lengths(
    group: SequenceParallelGroupCoordinator, query: torch.Tensor, key: torch.Tensor, joint: Joint | None
) -> list[int]:
    """Tokens of every rank of the group.

    The ranks tell each other at every call: that its own length is as before tells a rank nothing of the others', so
    there is nothing by which all of them could know that they need not.
    """
    if group.world_size == 1:
        return [query.shape[2]]
    same = [query.shape[0], query.shape[1], key.shape[1], query.shape[3]]
    same += [joint.q.shape[2], joint.k.shape[2]] if joint else [-1, -1]
    told = gather_numbers([query.shape[2], *same], group.cpu_group)
    if any(others != same for _, *others in told):
        raise ValueError(
            "ranks of the sequence group must differ in the number of their own tokens alone, but (batch, heads, key"
            f" heads, head dimension, joint queries, joint keys; -1 is none) are {[tuple(other) for _, *other in told]}"
        )
    return [length for length, *_ in told]
