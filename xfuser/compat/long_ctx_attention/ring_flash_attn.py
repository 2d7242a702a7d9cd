"""Ring attention as a function (arXiv 2310.01889), over the engine's own ring."""

from typing import Any

import torch
import torch.distributed as dist
from yunchang.kernels import AttnType

from xfuser.compat.long_ctx_attention.sharded import JOINT, backend_for, check_options, check_tensors
from xfuser.core.attention.kernels import autocast
from xfuser.core.attention.ring import ring_attention
from xfuser.core.distributed import get_sp_group
from xfuser.core.distributed.group_coordinator import gather_numbers
from xfuser.core.gradients import forward_only


def xdit_ring_flash_attn_func(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: torch.Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: dist.ProcessGroup | None = None,
    attn_type: AttnType | None = None,
    attn_processor: Any = None,
    attn_layer: Any = None,
    joint_tensor_key: torch.Tensor | None = None,
    joint_tensor_value: torch.Tensor | None = None,
    joint_strategy: str = "none",
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor, None]:
    """Attention of this rank's queries to the keys of all ranks of a ring, and to the joint ones.

    Ranks may hold different numbers of tokens; queries need not be as many as keys. Joint queries are the caller's to
    put among ``q``.

    Args:
        q: ``[B, Sq, H, D]``.
        k, v: ``[B, S, H, D]``; they may have fewer heads.
        group: the ring; by default the one of the sequence group.
        causal: a token attends to itself and to those before it; not with joint keys.
        attn_type: yunchang's name of a kernel. One that is absent is replaced by the best one here, with a warning.
        joint_tensor_key, joint_tensor_value: keys and values that every rank holds, ``[B, T, H, D]``.
        joint_strategy: "front" or "rear", where there are joint tensors.
        deterministic, attn_layer: without effect.
        dropout_p, window_size, alibi_slopes: must have their defaults.

    Returns:
        ``[B, Sq, H, D]``; with ``return_attn_probs``, that, its log-sum-exp ``[B, H, Sq]``, and None.

    Raises:
        ValueError: tensors do not fit each other, or something is asked that is not available; ``backward()`` through
            the result raises it, too.
    """
    check_options(dropout_p, window_size, alibi_slopes)
    q, k, v, joint_tensor_key, joint_tensor_value = autocast(q, k, v, joint_tensor_key, joint_tensor_value)
    joint = dict(zip(JOINT[1:], (joint_tensor_key, joint_tensor_value), strict=True))
    has_joint = check_tensors({"q": q, "k": k, "v": v}, joint, joint_strategy, 2)
    beside = tuple(x.transpose(1, 2) for x in joint.values()) if has_joint else None
    if causal and (beside or q.shape[1] != k.shape[1]):
        raise ValueError(
            f"causal=True with q {tuple(q.shape)}, k {tuple(k.shape)}: needs one query per key, and no joint keys"
        )
    group = get_sp_group().ring_group if group is None else group
    backend = backend_for(attn_type, attn_processor)
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        lengths = [length for (length,) in gather_numbers([k.shape[1]], group, k.device)]
        options = {"scale": softmax_scale, "backend": backend, "causal": causal, "joint": beside}
        out, lse = ring_attention(*(x.transpose(1, 2) for x in (q, k, v)), lengths, group, **options)
    out = forward_only(out.transpose(1, 2).contiguous(), q, k, v, joint_tensor_key, joint_tensor_value)
    return (out, lse, None) if return_attn_probs else out
