"""Ulysses and ring together."""

from xfuser.core.long_ctx_attention.hybrid.attn_layer import xFuserLongContextAttention

__all__ = ["xFuserLongContextAttention"]
