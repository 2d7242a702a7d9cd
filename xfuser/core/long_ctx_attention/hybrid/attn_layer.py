"""A path by which research code imports the layer."""

from xfuser.compat.long_ctx_attention.attn_layer import xFuserLongContextAttention

__all__ = ["xFuserLongContextAttention"]
