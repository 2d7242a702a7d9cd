"""What callers ask of attention over shares: refused with a ValueError where it cannot be exact.

The tensors' layout is the caller's: ``heads`` tells which dimension that is, 1 or 2, and the other one is the tokens.
"""

from functools import cache
from typing import Any

import torch
from yunchang.kernels import AttnType

from xfuser.core.attention.kernels import KERNELS
from xfuser.core.logger import logger

KERNEL_OF = {  # by yunchang's name
    "fa": "flash_attn",
    "fa3": "flash_attn_3",
    "torch_cudnn": "cudnn",
    "torch_efficient": "efficient",
    "torch_flash": "flash",
    "torch_math": "math",
}

Tensors = dict[str, torch.Tensor | None]


def backend_for(attn_type: AttnType | str | None, attn_processor: Any = None) -> str:
    """The kernel for yunchang's ``attn_type``; where that one is absent, the best one here, and a warning once."""
    if attn_processor is not None:
        _tell(f"attn_processor={type(attn_processor).__name__} is not used: exact attention runs instead")
    if attn_type is None:
        return "auto"
    kind = getattr(attn_type, "value", attn_type)
    if kind not in [known.value for known in AttnType]:
        raise ValueError(f"attn_type={attn_type!r} is unknown; known are {', '.join(map(str, AttnType))}")
    name = KERNEL_OF.get(kind)
    why = KERNELS[name].missing() if name else "not among the kernels of this engine"
    if why is None:
        return name
    _tell(f"attn_type={kind!r}: {why}; the best kernel that is here runs instead")
    return "auto"


@cache
def _tell(what: str) -> None:
    logger.warning(what)


def check_options(dropout_p: float, window_size: Any = None, alibi_slopes: Any = None) -> None:
    """Refuse what no kernel here does over shares."""
    if dropout_p:
        raise ValueError(f"dropout_p={dropout_p} must be 0: attention over shares is for inference")
    if window_size is not None and tuple(window_size) != (-1, -1):
        raise ValueError(f"window_size={window_size} must be (-1, -1): attention within a window is not available")
    if alibi_slopes is not None:
        raise ValueError("alibi_slopes must be None: biases by position are not available")


def check_tensors(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, heads: int) -> None:
    """Refuse tensors that do not belong together."""
    given = {"query": query, "key": key, "value": value}
    _check_kind(given, heads)
    fits = (
        query.shape[0] == key.shape[0]
        and query.shape[3] == key.shape[3]
        and key.shape[:3] == value.shape[:3]
        and key.shape[heads] > 0
        and query.shape[heads] % key.shape[heads] == 0
    )
    if not fits:
        raise ValueError(
            f"{_shapes(given)}: key and value must have the same heads and tokens, query and key the same batch and"
            f" head dimension, and query heads (dimension {heads}) must be a multiple of key heads"
        )


def check_joint(joint: Tensors, strategy: str | None, like: dict[str, torch.Tensor], heads: int) -> bool:
    """Whether there are joint tensors; each must fit the one in ``like``, in all but the number of tokens."""
    if strategy not in (None, "none", "front", "rear"):
        raise ValueError(f"joint_strategy={strategy!r} is unknown; known are 'none', 'front', 'rear'")
    missing = [name for name, x in joint.items() if x is None]
    if len(missing) == len(joint):
        return False
    given = {name: x for name, x in joint.items() if x is not None}
    if missing:
        raise ValueError(f"{_shapes(given)} came without {', '.join(missing)}: give all of {', '.join(joint)}, or none")
    if strategy in (None, "none"):
        raise ValueError(
            f"{_shapes(given)} came with joint_strategy={strategy!r}: 'front' or 'rear' must say on which side of the"
            " sequence they are"
        )
    _check_kind(given | like, heads)
    tokens = 3 - heads
    for (name, x), (other, y) in zip(given.items(), like.items(), strict=True):
        if any(x.shape[dim] != y.shape[dim] for dim in (0, heads, 3)):
            raise ValueError(
                f"{_shapes({name: x, other: y})}: they may differ in the number of tokens (dimension {tokens}) alone"
            )
    *_, key, value = given.values()
    if key.shape[tokens] != value.shape[tokens]:
        raise ValueError(f"{_shapes(given)}: key and value must have the same number of tokens (dimension {tokens})")
    return True


def _check_kind(given: dict[str, torch.Tensor], heads: int) -> None:
    layout = "[B, H, S, D]" if heads == 1 else "[B, S, H, D]"
    if any(x.dim() != 4 for x in given.values()):
        raise ValueError(f"{_shapes(given)}: all must have four dimensions, {layout}")
    if len({(x.dtype, x.device) for x in given.values()}) > 1:
        kinds = ", ".join(f"{name} {x.dtype} on {x.device}" for name, x in given.items())
        raise ValueError(f"{kinds}: all must have one dtype, and be on one device")


def _shapes(given: dict[str, torch.Tensor]) -> str:
    return ", ".join(f"{name} {tuple(x.shape)}" for name, x in given.items())
