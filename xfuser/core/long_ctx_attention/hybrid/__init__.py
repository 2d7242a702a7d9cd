"""Ulysses and ring combined."""

from xfuser.compat.attention import xFuserLongContextAttention

__all__ = ["xFuserLongContextAttention"]
