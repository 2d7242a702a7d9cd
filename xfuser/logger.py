"""Import path of the logger, kept for existing scripts."""

from xfuser.core.logger import init_logger, logger

__all__ = ["init_logger", "logger"]
