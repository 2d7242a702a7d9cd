"""A failing rank reports its error and exits at once, so that the launcher ends the others and nothing hangs."""

import os
import sys
import time
import traceback
from types import TracebackType

from xfuser.core.distributed.environment import number

RANK_ZERO_SPEAKS_FIRST = 3.0  # seconds


def fail_together() -> None:
    """Let an uncaught exception end this process at once if it is one rank of several (``WORLD_SIZE`` is over 1).

    A ``ValueError`` is usually the same on all ranks. Ranks other than 0 wait before they report theirs: if rank 0
    fails, too, its exit makes the launcher end them before they report. An error of a single rank is still reported.
    """
    if (number("WORLD_SIZE") or 1) > 1:
        sys.excepthook = _report_and_exit


def _report_and_exit(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    rank = os.environ.get("RANK", "0")
    if issubclass(kind, ValueError) and rank != "0":
        time.sleep(RANK_ZERO_SPEAKS_FIRST)
    # torch.distributed's own hook may call this one with sys.stderr redirected to a buffer.
    told = "".join(traceback.format_exception(kind, error, trace))
    print(f"\nrank {rank} failed:\n{told}", file=sys.__stderr__, flush=True)
    sys.stdout.flush()
    os._exit(1)  # interpreter shutdown could wait for collectives that never complete
