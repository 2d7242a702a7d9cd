"""Attention for models that run their own parallel forward: one layer, and the groups of ``core.distributed``."""

from yunchang.kernels import AttnType

from xfuser.compat.attention import xFuserLongContextAttention

__all__ = ["AttnType", "xFuserLongContextAttention"]
