"""TeaCache (arXiv 2411.19108): blocks are left out while the first block's input has changed little."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from xfuser.core.hooks import Arguments
from xfuser.methods.cache.means import SharedMeans
from xfuser.methods.cache.stack import StackState
from xfuser.models.teacache import TeaCachePlan


class TeaCache:
    """The rule of one model.

    Each step adds a polynomial of the signal's relative change against the last step's, mean|x - y| / mean|y|, to a
    sum. As long as the sum is below the threshold, blocks are left out; where it is not, they run, and it starts from
    0. They run in the first steps and in the last one.

    Args:
        plan: the polynomial, and what the signal is.
        threshold: of the sum.
        must_run: whether the step that is running is one of those in which all blocks run.
    """

    behind_first = False

    def __init__(self, plan: TeaCachePlan, threshold: float, means: SharedMeans, must_run: Callable[[], bool]) -> None:
        self._plan, self._threshold, self._means, self._must_run = plan, threshold, means, must_run

    def skips(self, state: StackState, block: nn.Module, given: Arguments, image: Tensor) -> bool:
        """Whether blocks are left out, where ``image`` are the tokens that the first one is given."""
        signal = SIGNALS[self._plan.signal](block, image, given["temb"])
        before, state.signal = state.signal, signal
        if before is not None and not self._must_run():
            change = self._means.decide(partial(_relative_change, signal, before), ("image",))
            state.total += _polynomial(self._plan.coefficients, change)
            if state.total < self._threshold:
                return True
        state.total = 0.0
        return False


def _scaled_norm(block: nn.Module, image: Tensor, temb: Tensor) -> Tensor:
    """``[B, S, D]``; the first two rows of the block's table, and of its time embedding, are shift and scale."""
    rows = block.scale_shift_table + temb.unflatten(-1, (len(block.scale_shift_table), -1))
    return block.norm1(image) * (1 + rows[..., 1, :]) + rows[..., 0, :]


SIGNALS: dict[str, Callable[[nn.Module, Tensor, Tensor], Tensor]] = {
    "time": lambda block, image, temb: temb,
    "norm": lambda block, image, temb: block.norm1(image, emb=temb)[0],
    "scaled": _scaled_norm,
}


def _relative_change(x: Tensor, before: Tensor) -> float:
    return ((x - before).abs().mean() / before.abs().mean()).item()


def _polynomial(coefficients: tuple[float, ...], x: float) -> float:
    result = 0.0
    for coefficient in coefficients:
        result = result * x + coefficient
    return result
