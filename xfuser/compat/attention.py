"""Sharded attention with the interface of research code: one layer, two functions, and the Ulysses all-to-alls."""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from yunchang.kernels import AttnType

from xfuser.compat.sharded import JOINT, backend_for, check_options, check_tensors, sharded_attention
from xfuser.config.config import check_known
from xfuser.core.attention.kernels import autocast
from xfuser.core.attention.ring import ring_attention
from xfuser.core.attention.ulysses import gather_heads, scatter_heads
from xfuser.core.distributed import get_pp_group, get_sp_group
from xfuser.core.distributed.group_coordinator import gather_numbers
from xfuser.core.gradients import forward_only

RANK_ORDERED = ("basic", "basic_pytorch", "basic_flashinfer", "basic_npu")
REORDERED = ("zigzag", "strip")  # the caller's shards are not consecutive tokens


class xFuserLongContextAttention(nn.Module):
    """Attention over tokens that are sharded over the ranks of the sequence group (USP, arXiv 2405.07719).

    It requires the groups of ``initialize_model_parallel``, and uses their Ulysses and ring degrees. It has no weights
    and no state, and may be created at any time after them.

    Args:
        scatter_idx, gather_idx: the dimensions of heads and tokens, 2 and 1.
        ring_impl_type: the order of tokens over the ranks, which matters only for ``causal``.
        use_pack_qkv, use_sync: no effect.
        use_kv_cache: ignored without PipeFusion; raises a ValueError with it.
        attn_type: yunchang's name of a kernel. If it is not available, the best available one runs, with a warning.
        attn_processor: no effect except a warning.

    Raises:
        RuntimeError: the groups are not initialised.
        ValueError: an argument is not supported.
    """

    def __init__(
        self,
        scatter_idx: int = 2,
        gather_idx: int = 1,
        ring_impl_type: str = "basic",
        use_pack_qkv: bool = False,
        use_kv_cache: bool = False,
        use_sync: bool = False,
        attn_type: AttnType | None = None,
        attn_processor: Any = None,
    ) -> None:
        super().__init__()
        get_sp_group()  # raises here rather than in the middle of a forward
        if (scatter_idx, gather_idx) != (2, 1):
            raise ValueError(
                f"scatter_idx={scatter_idx}, gather_idx={gather_idx} must be 2 and 1: tensors are [B, S/sp, H, D]"
            )
        check_known("ring_impl_type", ring_impl_type, RANK_ORDERED + REORDERED)
        _check_cache("use_kv_cache=True", use_kv_cache)
        self.ring_impl_type = ring_impl_type
        self._backend = backend_for(attn_type, attn_processor)

    def forward(
        self,
        attn: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        *,
        joint_tensor_query: Tensor | None = None,
        joint_tensor_key: Tensor | None = None,
        joint_tensor_value: Tensor | None = None,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        joint_strategy: str = "none",
    ) -> Tensor:
        """Attention of this rank's tokens, and of the joint ones, to all tokens of the group and the joint ones.

        Ranks may hold different numbers of tokens; any number of heads is supported.

        Args:
            attn: not used; callers pass their module, or None.
            query, key, value: this rank's tokens, ``[B, S_local, H, D]``; key and value may have fewer heads.
            joint_tensor_query, joint_tensor_key, joint_tensor_value: tokens that every rank holds, ``[B, T, H, D]``.
            joint_strategy: "front" or "rear": whether joint tokens come before or after the sequence.
            softmax_scale: ``D ** -0.5`` by default.
            causal: a token attends to itself and to earlier ones; shards must be consecutive tokens, in rank order.
            deterministic: no effect, as it concerns gradients.
            dropout_p, window_size, alibi_slopes, return_attn_probs: must have their defaults.

        Returns:
            ``[B, S_local, H, D]``, or ``[B, T + S_local, H, D]`` in the order of ``joint_strategy``.

        Raises:
            ValueError: tensors do not match each other or those of the other ranks, or an option is not supported.
                ``backward()`` through the result also raises it.
        """
        check_options(dropout_p, window_size, alibi_slopes)
        if return_attn_probs:
            raise ValueError("return_attn_probs=True is not supported: no rank holds the probabilities; remove it")
        if causal and self.ring_impl_type in REORDERED:
            raise ValueError(
                f"causal=True with ring_impl_type={self.ring_impl_type!r}: use 'basic', with consecutive tokens in"
                " rank order"
            )
        joint = (joint_tensor_query, joint_tensor_key, joint_tensor_value)
        options = {"scale": softmax_scale, "backend": self._backend}
        out = sharded_attention((query, key, value), joint, joint_strategy, 2, causal, **options)
        return out.contiguous()  # callers merge the last two dimensions by view()


def USP(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    joint_query: Tensor | None = None,
    joint_key: Tensor | None = None,
    joint_value: Tensor | None = None,
    joint_strategy: str | None = None,
    attn_layer: Any = None,
) -> Tensor:
    """As :meth:`xFuserLongContextAttention.forward`, with heads before tokens.

    Args:
        query, key, value: this rank's tokens, ``[B, H, S_local, D]``.
        joint_query, joint_key, joint_value: tokens that every rank holds, ``[B, H, T, D]``.
        attn_layer: the layer of a KV cache; ignored without PipeFusion; raises a ValueError with it.

    Returns:
        ``[B, H, S_local, D]``, or ``[B, H, T + S_local, D]`` in the order of ``joint_strategy``.
    """
    check_options(dropout_p)
    _check_cache("attn_layer", attn_layer is not None)
    joint = (joint_query, joint_key, joint_value)
    return sharded_attention((query, key, value), joint, joint_strategy, 1, is_causal)


def _check_cache(name: str, is_given: bool) -> None:
    if is_given and get_pp_group().world_size > 1:
        raise ValueError(f"{name}: under PipeFusion, xDiTParallel keeps keys and values; remove it")


def xdit_ring_flash_attn_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    group: dist.ProcessGroup | None = None,
    attn_type: AttnType | None = None,
    attn_processor: Any = None,
    attn_layer: Any = None,
    joint_tensor_key: Tensor | None = None,
    joint_tensor_value: Tensor | None = None,
    joint_strategy: str = "none",
) -> Tensor | tuple[Tensor, Tensor, None]:
    """Attention of this rank's queries to the keys of all ranks of a ring, and to the joint ones (arXiv 2310.01889).

    Ranks may hold different numbers of tokens, and queries and keys may differ in number. Joint queries must be part of
    ``q``. Other arguments and errors are those of :class:`xFuserLongContextAttention`; ``attn_layer`` has no effect.

    Args:
        q: ``[B, Sq, H, D]``.
        k, v: ``[B, S, H, D]``; they may have fewer heads.
        group: the ring; by default the one of the sequence group.
        causal: a token attends to itself and to earlier ones. Not supported with joint keys.
        joint_tensor_key, joint_tensor_value: keys and values that every rank holds, ``[B, T, H, D]``.

    Returns:
        ``[B, Sq, H, D]``; with ``return_attn_probs``, a tuple of it, its LSE ``[B, H, Sq]``, and None.
    """
    check_options(dropout_p, window_size, alibi_slopes)
    q, k, v, joint_tensor_key, joint_tensor_value = autocast(q, k, v, joint_tensor_key, joint_tensor_value)
    joint = dict(zip(JOINT[1:], (joint_tensor_key, joint_tensor_value), strict=True))
    has_joint = check_tensors({"q": q, "k": k, "v": v}, joint, joint_strategy, 2)
    beside = tuple(x.transpose(1, 2) for x in joint.values()) if has_joint else None
    if causal and (beside or q.shape[1] != k.shape[1]):
        raise ValueError(
            f"causal=True with q {tuple(q.shape)}, k {tuple(k.shape)}: requires one query per key, and no joint keys"
        )
    group = get_sp_group().ring_group if group is None else group
    options = {"scale": softmax_scale, "backend": backend_for(attn_type, attn_processor), "causal": causal}
    with torch.no_grad(), torch.autocast(q.device.type, enabled=False):
        lengths = [length for (length,) in gather_numbers([k.shape[1]], group, k.device)]
        heads_first = [x.transpose(1, 2) for x in (q, k, v)]
        out, lse = ring_attention(*heads_first, lengths, group, joint=beside, **options)
    out = forward_only(out.transpose(1, 2).contiguous(), q, k, v, joint_tensor_key, joint_tensor_value)
    return (out, lse, None) if return_attn_probs else out


def _ft_c_input_all_to_all(x: Tensor) -> Tensor:
    """``[B, H, S/U, D]`` to ``[B, H/U, S, D]``, over the U ranks of the Ulysses group.

    Raises:
        ValueError: the number of heads is not divisible by U, or ranks hold different numbers of tokens.
    """
    sp = get_sp_group()
    ranks = sp.ulysses_world_size
    if ranks == 1:
        return x
    _check_divides(x, 1, "heads", ranks)
    lengths = [length for (length,) in gather_numbers([x.shape[2]], sp.cpu_group)][sp.ring_rank * ranks :][:ranks]
    if len(set(lengths)) > 1:
        raise ValueError(
            f"{tuple(x.shape)}: ranks hold {lengths} tokens (dimension 2), and must hold equally many; use USP"
        )
    with torch.no_grad():
        (scattered,) = scatter_heads([x], lengths, [[x.shape[1] // ranks] * ranks], sp.ulysses_group)
    return forward_only(scattered, x)


def _ft_c_output_all_to_all(x: Tensor) -> Tensor:
    """``[B, H/U, S, D]`` back to ``[B, H, S/U, D]``, over the U ranks of the Ulysses group.

    Raises:
        ValueError: the number of tokens is not divisible by U.
    """
    sp = get_sp_group()
    ranks = sp.ulysses_world_size
    if ranks == 1:
        return x
    _check_divides(x, 2, "tokens", ranks)
    with torch.no_grad():
        gathered = gather_heads(x, [x.shape[2] // ranks] * ranks, [x.shape[1]] * ranks, sp.ulysses_group)
    return forward_only(gathered, x)


def _check_divides(x: Tensor, dim: int, what: str, ranks: int) -> None:
    if x.dim() != 4 or x.shape[dim] % ranks:
        raise ValueError(
            f"{tuple(x.shape)} must be [B, H, S, D] with {what} (dimension {dim}) that divide by the {ranks} ranks of"
            " the Ulysses group; USP supports any number"
        )
