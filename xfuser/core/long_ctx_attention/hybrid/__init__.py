"""Ulysses and ring together."""

from xfuser.compat.attention import xFuserLongContextAttention

__all__ = ["xFuserLongContextAttention"]
