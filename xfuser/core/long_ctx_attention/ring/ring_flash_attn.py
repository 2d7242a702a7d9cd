"""A path by which research code imports the ring."""

from xfuser.compat.attention import xdit_ring_flash_attn_func

__all__ = ["xdit_ring_flash_attn_func"]
