"""Import path of the interface of the engine's first generation, as scripts use it."""

from xfuser.compat.legacy import DistriConfig, PatchConv2d, __getattr__

__all__ = ["DistriConfig", "PatchConv2d", "__getattr__"]
