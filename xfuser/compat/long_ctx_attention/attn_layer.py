"""The one attention layer that research code imports, over the engine's own Ulysses and ring."""

from typing import Any

import torch
from torch import nn
from yunchang.kernels import AttnType

from xfuser.compat.long_ctx_attention.sharded import backend_for, check_options, sharded_attention
from xfuser.config.config import check_known
from xfuser.core.distributed import get_pp_group, get_sp_group

RANK_ORDERED = ("basic", "basic_pytorch", "basic_flashinfer", "basic_npu")
REORDERED = ("zigzag", "strip")  # the caller's shards are not consecutive tokens


class xFuserLongContextAttention(nn.Module):
    """Attention over tokens of which each rank of the sequence group holds a shard (USP, arXiv 2405.07719).

    It needs the groups of ``initialize_model_parallel``, whose Ulysses and ring degrees it follows, and has no weights
    and no state: it may be made once, for each block, or for each call.

    Args:
        scatter_idx, gather_idx: the dimensions of heads and tokens, 2 and 1.
        ring_impl_type: the order of tokens over the ranks, which matters to ``causal`` alone.
        use_pack_qkv, use_sync: without effect: queries, keys and values travel in one message anyway, and what follows
            a message waits for it.
        use_kv_cache: without effect where there is no PipeFusion, and refused where there is.
        attn_type: yunchang's name of a kernel. One that is absent is replaced by the best one here, with a warning.
        attn_processor: without effect but for a warning.

    Raises:
        RuntimeError: the groups are not initialised.
        ValueError: for arguments that are not supported.
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
        if use_kv_cache and get_pp_group().world_size > 1:
            raise ValueError("use_kv_cache=True: under PipeFusion, xDiTParallel keeps keys and values; remove it")
        self.ring_impl_type = ring_impl_type
        self._backend = backend_for(attn_type, attn_processor)

    def forward(
        self,
        attn: Any,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        joint_tensor_query: torch.Tensor | None = None,
        joint_tensor_key: torch.Tensor | None = None,
        joint_tensor_value: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: torch.Tensor | None = None,
        deterministic: bool = False,
        return_attn_probs: bool = False,
        joint_strategy: str = "none",
    ) -> torch.Tensor:
        """Attention of this rank's tokens, and of the joint ones, to all tokens of the group and the joint ones.

        Ranks may hold different numbers of tokens, and any number of heads.

        Args:
            attn: not used; callers pass their module, or None.
            query, key, value: this rank's tokens, ``[B, S_local, H, D]``; key and value may have fewer heads.
            joint_tensor_query, joint_tensor_key, joint_tensor_value: tokens that every rank holds, ``[B, T, H, D]``.
            joint_strategy: "front" or "rear" of the sequence, where there are joint tokens.
            softmax_scale: ``D ** -0.5`` by default.
            causal: a token attends to itself and to those before it; shards must be consecutive tokens, in rank order.
            deterministic: without effect; it is about gradients.
            dropout_p, window_size, alibi_slopes, return_attn_probs: must have their defaults.

        Returns:
            ``[B, S_local, H, D]``, or ``[B, T + S_local, H, D]`` in the order of ``joint_strategy``.

        Raises:
            ValueError: tensors do not fit each other or those of the other ranks, or something is asked that is not
                available. ``backward()`` through the result raises it, too.
        """
        check_options(dropout_p, window_size, alibi_slopes)
        if return_attn_probs:
            raise ValueError("return_attn_probs=True: no rank ever holds the probabilities; remove it")
        if causal and self.ring_impl_type in REORDERED:
            raise ValueError(
                f"causal=True with ring_impl_type={self.ring_impl_type!r}: use 'basic', and give rank after rank"
                " consecutive tokens"
            )
        joint = (joint_tensor_query, joint_tensor_key, joint_tensor_value)
        options = {"scale": softmax_scale, "backend": self._backend}
        out = sharded_attention((query, key, value), joint, joint_strategy, 2, causal, **options)
        return out.contiguous()  # callers view heads and their dimension as one
