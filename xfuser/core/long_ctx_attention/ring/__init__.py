"""The ring alone."""

from xfuser.core.long_ctx_attention.ring.ring_flash_attn import xdit_ring_flash_attn_func

__all__ = ["xdit_ring_flash_attn_func"]
