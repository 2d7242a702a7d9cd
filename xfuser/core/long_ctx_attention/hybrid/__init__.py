"""Ulysses and ring together."""

from xfuser.compat.long_ctx_attention.attn_layer import xFuserLongContextAttention

__all__ = ["xFuserLongContextAttention"]
