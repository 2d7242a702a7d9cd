"""A path by which research code imports the layer."""

from xfuser.compat.attention import xFuserLongContextAttention

__all__ = ["xFuserLongContextAttention"]
