"""Progress bars."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from xfuser.core.distributed import get_world_group
from xfuser.core.hooks import replaced
from xfuser.methods.pipefusion.loop import loops_of


@contextmanager
def quiet_progress(pipe: Any) -> Iterator[None]:
    """Within the context, only rank 0 shows progress bars: the pipeline's, or those of a modular pipeline's loops."""
    with ExitStack() as stack:
        for owner in (pipe, *loops_of(pipe)) if not get_world_group().is_first_rank else ():
            before = getattr(owner, "_progress_bar_config", {})
            stack.enter_context(replaced(owner, "_progress_bar_config", before | {"disable": True}))
        yield
