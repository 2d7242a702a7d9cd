"""The ring alone."""

from xfuser.compat.long_ctx_attention.ring_flash_attn import xdit_ring_flash_attn_func

__all__ = ["xdit_ring_flash_attn_func"]
