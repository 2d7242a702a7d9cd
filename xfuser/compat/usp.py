"""Sharded attention as a function of ``[B, H, S, D]`` tensors, and the all-to-alls of Ulysses."""

from typing import Any

import torch

from xfuser.compat.long_ctx_attention.sharded import check_options, sharded_attention
from xfuser.core.attention.ulysses import gather_heads, scatter_heads
from xfuser.core.distributed import get_pp_group, get_sp_group
from xfuser.core.distributed.group_coordinator import gather_numbers
from xfuser.core.gradients import forward_only


def USP(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    joint_query: torch.Tensor | None = None,
    joint_key: torch.Tensor | None = None,
    joint_value: torch.Tensor | None = None,
    joint_strategy: str | None = None,
    attn_layer: Any = None,
) -> torch.Tensor:
    """Attention of this rank's tokens to all tokens of the sequence group (USP, arXiv 2405.07719).

    As ``xFuserLongContextAttention``, with heads before tokens.

    Args:
        query, key, value: this rank's tokens, ``[B, H, S_local, D]``; key and value may have fewer heads.
        dropout_p: must be 0.
        is_causal: a token attends to itself and to those before it; shards must be consecutive tokens, in rank order.
        joint_query, joint_key, joint_value: tokens that every rank holds, ``[B, H, T, D]``.
        joint_strategy: "front" or "rear" of the sequence, where there are joint tokens.
        attn_layer: names a cache of keys; without effect where there is no PipeFusion, and refused where there is.

    Returns:
        ``[B, H, S_local, D]``, or ``[B, H, T + S_local, D]`` in the order of ``joint_strategy``.

    Raises:
        ValueError: tensors do not fit each other or those of the other ranks, or something is asked that is not
            available. ``backward()`` through the result raises it, too.
    """
    check_options(dropout_p)
    if attn_layer is not None and get_pp_group().world_size > 1:
        raise ValueError("attn_layer: under PipeFusion, xDiTParallel keeps keys and values; remove it")
    joint = (joint_query, joint_key, joint_value)
    return sharded_attention((query, key, value), joint, joint_strategy, 1, causal=is_causal)


def _ft_c_input_all_to_all(x: torch.Tensor) -> torch.Tensor:
    """``[B, H, S/U, D]`` to ``[B, H/U, S, D]``, over the U ranks of the Ulysses group.

    Raises:
        ValueError: the heads do not divide by U, or ranks hold different numbers of tokens.
    """
    sp = get_sp_group()
    ranks = sp.ulysses_world_size
    if ranks == 1:
        return x
    _check_divides(x, 1, "heads", ranks)
    told = gather_numbers([x.shape[2]], sp.cpu_group)[sp.ring_rank * ranks :][:ranks]
    lengths = [length for (length,) in told]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"{tuple(x.shape)}: ranks hold {lengths} tokens (dimension 2), and must hold as many each; use USP"
        )
    with torch.no_grad():
        (scattered,) = scatter_heads([x], lengths, [[x.shape[1] // ranks] * ranks], sp.ulysses_group)
    return forward_only(scattered, x)


def _ft_c_output_all_to_all(x: torch.Tensor) -> torch.Tensor:
    """``[B, H/U, S, D]`` back to ``[B, H, S/U, D]``, over the U ranks of the Ulysses group.

    Raises:
        ValueError: the tokens do not divide by U.
    """
    sp = get_sp_group()
    ranks = sp.ulysses_world_size
    if ranks == 1:
        return x
    _check_divides(x, 2, "tokens", ranks)
    with torch.no_grad():
        gathered = gather_heads(x, [x.shape[2] // ranks] * ranks, [x.shape[1]] * ranks, sp.ulysses_group)
    return forward_only(gathered, x)


def _check_divides(x: torch.Tensor, dim: int, what: str, ranks: int) -> None:
    if x.dim() != 4 or x.shape[dim] % ranks:
        raise ValueError(
            f"{tuple(x.shape)} must be [B, H, S, D] with {what} (dimension {dim}) that divide by the {ranks} ranks of"
            " the Ulysses group; USP takes any number"
        )
