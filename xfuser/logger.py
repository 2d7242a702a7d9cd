"""The library's one logger: below ERROR, only rank 0 speaks."""

import logging
import os


class _RankZeroFilter(logging.Filter):
    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or os.environ.get("RANK", "0") == "0"


logger = logging.getLogger("xfuser")
logger.addFilter(_RankZeroFilter())
