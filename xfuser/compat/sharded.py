"""Attention over a sequence sharded over ranks, in shards of any length; raises if the result cannot be exact.

The tensors have the caller's layout: ``heads`` is the dimension of heads, 1 or 2; the other one is that of tokens.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor
from yunchang.kernels import AttnType

from xfuser.config.config import check_known
from xfuser.core.attention.kernels import KERNELS, autocast
from xfuser.core.attention.usp import Joint, usp_attention
from xfuser.core.distributed import GroupCoordinator, get_sp_group
from xfuser.core.distributed.group_coordinator import gather_numbers
from xfuser.core.gradients import forward_only
from xfuser.core.logger import logger

# Kernels by yunchang's name.
KERNEL_OF = {"fa": "flash_attn", "fa3": "flash_attn_3", "torch_cudnn": "cudnn", "torch_efficient": "efficient"}
KERNEL_OF |= {"torch_flash": "flash", "torch_math": "math"}
JOINT = ("joint_tensor_query", "joint_tensor_key", "joint_tensor_value")

Tensors = dict[str, Tensor | None]


def sharded_attention(
    qkv: tuple[Tensor, ...],
    joint: tuple[Tensor | None, ...],
    strategy: str | None,
    heads: int,
    causal: bool = False,
    **options: Any,
) -> Tensor:
    """Attention of this rank's tokens to all tokens of the sequence group.

    Args:
        qkv: query, key and value, of four dimensions: ``heads`` (1 or 2) is that of heads, the other one (2 or 1) that
            of tokens. Key and value may have fewer heads.
        joint: query, key and value of tokens that every rank holds, or three times None.
        strategy: "front" or "rear": the position of those tokens in the result.
        causal: a token attends to itself and to earlier ones; shards must be consecutive tokens, in rank order.
        options: ``scale`` and ``backend`` of :func:`usp_attention`.

    Returns:
        This rank's tokens, with the joint ones before or after them, in the same layout.
    """
    query, key, value, *joint = autocast(*qkv, *joint)
    given = {"query": query, "key": key, "value": value}
    has_joint = check_tensors(given, dict(zip(JOINT, joint, strict=True)), strategy, heads)
    if has_joint and causal:
        raise ValueError("causal=True has no meaning beside joint tensors: remove one of them")
    if query.shape[3 - heads] != key.shape[3 - heads]:
        raise ValueError(
            f"{_shapes({'query': query, 'key': key})}: a rank must hold as many queries as keys (dimension"
            f" {3 - heads}); pass tokens that every rank holds as the joint tensors"
        )
    with torch.no_grad(), torch.autocast(query.device.type, enabled=False):
        group = get_sp_group()
        q, k, v = (x.movedim(heads, 1) for x in (query, key, value))
        beside = Joint(*(x.movedim(heads, 1) for x in joint), front=strategy == "front") if has_joint else None
        out = usp_attention(q, k, v, _lengths(group, q, k, beside), group, causal=causal, joint=beside, **options)
    return forward_only(out, query, key, value, *joint).movedim(1, heads)


def _lengths(group: GroupCoordinator, query: Tensor, key: Tensor, joint: Joint | None) -> list[int]:
    """Number of tokens of every rank of the group.

    Ranks exchange them in every call: a rank whose length is unchanged cannot know whether the others' are.
    """
    if group.world_size == 1:
        return [query.shape[2]]
    same = [query.shape[0], query.shape[1], key.shape[1], query.shape[3]]
    same += [joint.q.shape[2], joint.k.shape[2]] if joint else [-1, -1]
    found = gather_numbers([query.shape[2], *same], group.cpu_group)
    if any(others != same for _, *others in found):
        raise ValueError(
            "ranks of the sequence group may differ only in their number of tokens, but (batch, heads, key heads,"
            f" head dimension, joint queries, joint keys; -1 is none) are {[tuple(other) for _, *other in found]}"
        )
    return [length for length, *_ in found]


def backend_for(attn_type: AttnType | str | None, attn_processor: Any = None) -> str:
    """The kernel for yunchang's ``attn_type``; if it is not available, ``"auto"``, with one warning."""
    if attn_processor is not None:
        _warn_once(f"attn_processor={type(attn_processor).__name__} is not used: exact attention runs instead")
    if attn_type is None:
        return "auto"
    kind = getattr(attn_type, "value", attn_type)
    if kind not in [known.value for known in AttnType]:
        check_known("attn_type", attn_type, AttnType)
    name = KERNEL_OF.get(kind)
    why = KERNELS[name].missing() if name else "not a kernel of this engine"
    if why is None:
        return name
    _warn_once(f"attn_type={kind!r}: {why}; the best available kernel runs instead")
    return "auto"


_warn_once = cache(logger.warning)


def check_options(dropout_p: float, window_size: Any = None, alibi_slopes: Any = None) -> None:
    """Raise a ValueError for options that no kernel here supports on shards."""
    if dropout_p:
        raise ValueError(f"dropout_p={dropout_p} must be 0: sharded attention is for inference")
    if window_size is not None and tuple(window_size) != (-1, -1):
        raise ValueError(f"window_size={window_size} must be (-1, -1): attention within a window is not supported")
    if alibi_slopes is not None:
        raise ValueError("alibi_slopes must be None: biases by position are not supported")


def check_tensors(qkv: Tensors, joint: Tensors, strategy: str | None, heads: int) -> bool:
    """Raise a ValueError for tensors that do not match; return whether there are joint ones.

    Args:
        qkv: query, key and value by the caller's names.
        joint: query, key and value of the joint tokens, or only key and value, or as many times None.
    """
    check_known("joint_strategy", strategy or "none", ("none", "front", "rear"))
    given = {name: x for name, x in joint.items() if x is not None}
    if given and len(given) < len(joint):
        missing = ", ".join(name for name in joint if name not in given)
        raise ValueError(f"{_shapes(given)} came without {missing}: give all of {', '.join(joint)}, or none")
    if given and strategy in (None, "none"):
        raise ValueError(f"{_shapes(given)} came with joint_strategy={strategy!r}, which must be 'front' or 'rear'")
    _check_kind(qkv | given, heads)
    tokens, (query, key, value) = 3 - heads, qkv.values()
    fits = query.shape[0] == key.shape[0] and query.shape[3] == key.shape[3] and key.shape[:3] == value.shape[:3]
    if not fits or key.shape[heads] == 0 or query.shape[heads] % key.shape[heads]:
        raise ValueError(
            f"{_shapes(qkv)}: key and value must have the same heads and tokens, query and key the same batch and"
            f" head dimension, and query heads (dimension {heads}) must be a multiple of key heads"
        )
    for (name, x), (other, y) in zip(given.items(), list(qkv.items())[-len(joint) :], strict=False):
        if any(x.shape[dim] != y.shape[dim] for dim in (0, heads, 3)):
            raise ValueError(
                f"{_shapes({name: x, other: y})}: they may differ only in the number of tokens (dimension {tokens})"
            )
    if given and len({x.shape[tokens] for x in list(given.values())[-2:]}) > 1:
        raise ValueError(f"{_shapes(given)}: key and value must have the same number of tokens (dimension {tokens})")
    return bool(given)


def _check_kind(given: dict[str, Tensor], heads: int) -> None:
    layout = "[B, H, S, D]" if heads == 1 else "[B, S, H, D]"
    if any(x.dim() != 4 for x in given.values()):
        raise ValueError(f"{_shapes(given)}: all must have four dimensions, {layout}")
    if len({(x.dtype, x.device) for x in given.values()}) > 1:
        kinds = ", ".join(f"{name} {x.dtype} on {x.device}" for name, x in given.items())
        raise ValueError(f"{kinds}: all must have one dtype, and be on one device")


def _shapes(given: dict[str, Tensor]) -> str:
    return ", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items())
