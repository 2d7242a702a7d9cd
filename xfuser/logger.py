"""Import path of the logger, as scripts use it."""

from xfuser.core.logger import logger

__all__ = ["logger"]
