"""The attention layer for models with their own parallel forward; it uses the groups of ``core.distributed``."""

from yunchang.kernels import AttnType

from xfuser.compat.attention import xFuserLongContextAttention

__all__ = ["AttnType", "xFuserLongContextAttention"]
