"""Import path of the logger, kept for existing scripts."""

from xfuser.core.logger import logger

__all__ = ["logger"]
