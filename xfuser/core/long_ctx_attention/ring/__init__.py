"""Ring attention only."""

from xfuser.compat.attention import xdit_ring_flash_attn_func

__all__ = ["xdit_ring_flash_attn_func"]
