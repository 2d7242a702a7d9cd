"""A rank that fails says why and dies at once, so that its launcher ends the others and nothing hangs."""

import os
import sys
import time
import traceback
from types import TracebackType

RANK_ZERO_SPEAKS_FIRST = 3.0  # seconds


def fail_together() -> None:
    """Let an uncaught exception end this process at once, when it is one rank of several (``RANK`` is set).

    A ``ValueError`` is mostly the same on all ranks: ranks other than 0 wait a moment with theirs, in which rank
    0's exit makes the launcher end them unheard; one that is alone in its error is still heard.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
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
