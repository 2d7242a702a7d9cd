"""Import path of the ring function, as research code uses it."""

from xfuser.compat.attention import xdit_ring_flash_attn_func

__all__ = ["xdit_ring_flash_attn_func"]
