"""Import path of the attention layer, as research code uses it."""

from xfuser.compat.attention import xFuserLongContextAttention

__all__ = ["xFuserLongContextAttention"]
