"""The path by which scripts import the logger."""

from xfuser.core.logger import logger

__all__ = ["logger"]
