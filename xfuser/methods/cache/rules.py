"""The rules by which a cache over a stack of blocks decides whether to skip them."""

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import numpy as np
from diffusers.hooks import first_block_cache
from torch import Tensor, nn

from xfuser.core.hooks import Arguments
from xfuser.methods.cache.means import SharedMeans
from xfuser.methods.cache.stack import StackState
from xfuser.models.teacache import TeaCachePlan


class FirstBlock:
    """Diffusers' rule of First-Block-Cache, for each patch separately: how much the first block's residual has changed.

    Diffusers' own hooks do not support blocks on several stages.
    """

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


class TeaCache:
    """The rule of TeaCache (arXiv 2411.19108) for one model: how much the first block's input has changed.

    Each step adds a polynomial of the signal's relative change since the last step, mean|x - y| / mean|y|, to a sum.
    While the sum is below the threshold, blocks are skipped; otherwise they run, and the sum is reset to 0. Blocks
    always run in the first steps and in the last one.

    Args:
        plan: the polynomial and the kind of signal.
        threshold: the threshold of the sum.
        must_run: returns whether all blocks must run in the current step.
    """

    behind_first = False

    def __init__(self, plan: TeaCachePlan, threshold: float, means: SharedMeans, must_run: Callable[[], bool]) -> None:
        self._plan, self._threshold, self._means, self._must_run = plan, threshold, means, must_run

    def skips(self, state: StackState, block: nn.Module, given: Arguments, image: Tensor) -> bool:
        """Whether to skip blocks; ``image`` are the image tokens that the first block gets."""
        signal = SIGNALS[self._plan.signal](block, image, given["temb"])
        before, state.signal = state.signal, signal
        if before is not None and not self._must_run():
            change = self._means.decide(partial(_relative_change, signal, before), ("image",))
            state.total += float(np.polyval(self._plan.coefficients, change))
            if state.total < self._threshold:
                return True
        state.total = 0.0
        return False


def _scaled_norm(block: nn.Module, image: Tensor, temb: Tensor) -> Tensor:
    """``[B, S, D]``; shift and scale are the first two rows of the block's table plus its time embedding."""
    rows = block.scale_shift_table + temb.unflatten(-1, (len(block.scale_shift_table), -1))
    return block.norm1(image) * (1 + rows[..., 1, :]) + rows[..., 0, :]


SIGNALS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "time": lambda block, image, temb: temb,
    "norm": lambda block, image, temb: block.norm1(image, emb=temb)[0],
    "scaled": _scaled_norm,
}


def _relative_change(x: Tensor, before: Tensor) -> float:
    return ((x - before).abs().mean() / before.abs().mean()).item()
