"""Progress bars."""

from typing import Any

from xfuser.call import CallState
from xfuser.core.distributed import get_world_group
from xfuser.core.hooks import replaced
from xfuser.methods.pipefusion.loop import loops_of


def quiet_progress(call: CallState, pipe: Any) -> None:
    """During the call, only rank 0 shows progress bars: the pipeline's, or those of a modular pipeline's loops."""
    for owner in (pipe, *loops_of(pipe)) if not get_world_group().is_first_rank else ():
        before = getattr(owner, "_progress_bar_config", {})
        call.enter_context(replaced(owner, "_progress_bar_config", before | {"disable": True}))
