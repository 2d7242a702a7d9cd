"""First-Block-Cache over several stages, which Diffusers' hooks do not support."""

from functools import partial
from types import SimpleNamespace

from diffusers.hooks import first_block_cache
from torch import Tensor, nn

from xfuser.core.hooks import Arguments
from xfuser.methods.cache.means import SharedMeans
from xfuser.methods.cache.stack import StackState


class FirstBlock:
    """Diffusers' rule, for each patch separately: how much the first block's residual has changed."""

    behind_first = True

    def __init__(self, threshold: float, means: SharedMeans) -> None:
        self._hook, self._means = first_block_cache.FBCHeadBlockHook(None, threshold), means

    def skips(self, state: StackState, block: nn.Module, given: Arguments, image: Tensor) -> bool:
        """Whether to skip blocks; ``image`` is the first block's residual."""
        state.signal = kept = state.signal or first_block_cache.FBCSharedBlockState()
        self._hook.state_manager = SimpleNamespace(get_state=lambda: kept)
        runs = self._means.decide(partial(self._hook._should_compute_remaining_blocks, image), ("image",))
        if runs:
            kept.head_block_residual = image
        return not runs
