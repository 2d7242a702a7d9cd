"""Import path of the first-generation engine's interface, kept for existing scripts."""

from xfuser.compat.legacy import DistriConfig, PatchConv2d, __getattr__

__all__ = ["DistriConfig", "PatchConv2d", "__getattr__"]
