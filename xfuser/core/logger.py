"""The library's logger. Below ERROR, only rank 0 logs."""

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist


def is_rank_zero() -> bool:
    """Whether this process is rank 0, or the only one."""
    return dist.get_rank() == 0 if dist.is_initialized() else os.environ.get("RANK", "0") == "0"


class _RankZeroFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or is_rank_zero()


_rank_zero = _RankZeroFilter()
logger = logging.getLogger("xfuser")
logger.addFilter(_rank_zero)


def init_logger(name: str) -> logging.Logger:
    """A logger of this name for a script. As with the library's, below ERROR, only rank 0 logs."""
    own = logging.getLogger(name)
    own.addFilter(_rank_zero)
    return own


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """Within the context, Diffusers and Transformers log only errors on ranks other than 0, without progress bars."""
    if is_rank_zero():
        yield
        return
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    libraries = (diffusers_logging, transformers_logging)
    levels = [library.get_verbosity() for library in libraries]
    bars = [library.is_progress_bar_enabled() for library in libraries]
    for library in libraries:
        library.set_verbosity_error()
        library.disable_progress_bar()
    try:
        yield
    finally:
        for library, level, bar in zip(libraries, levels, bars, strict=True):
            library.set_verbosity(level)
            if bar:
                library.enable_progress_bar()
