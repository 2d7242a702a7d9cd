"""The path by which scripts import the interface of the engine's first generation."""

from xfuser.compat.legacy import DistriConfig, PatchConv2d, __getattr__

__all__ = ["DistriConfig", "PatchConv2d", "__getattr__"]
