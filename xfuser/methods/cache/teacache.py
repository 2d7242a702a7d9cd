"""TeaCache (arXiv 2411.19108): blocks are left out while the first block's input has changed little."""

from collections.abc import Callable
from functools import partial

from torch import Tensor, nn

from xfuser.core.hooks import Arguments
from xfuser.methods.cache.means import SharedMeans
from xfuser.methods.cache.stack import StackState


class TeaCache:
    """The rule of one model.

    Each step adds a polynomial of the signal's relative change against the last step's, mean|x - y| / mean|y|, to a
    sum. As long as the sum is below the threshold, blocks are left out; where it is not, they run, and it starts from
    0. They run in the first and in the last step.

    Args:
        coefficients: of the polynomial, the highest power first.
        threshold: of the sum.
        by_time: whether the signal is the first block's time embedding; else, its modulated norm of the image tokens.
        is_last: whether the step that is running is the last one.
    """

    behind_first = False

    def __init__(
        self,
        coefficients: tuple[float, ...],
        threshold: float,
        by_time: bool,
        means: SharedMeans,
        is_last: Callable[[], bool],
    ) -> None:
        self._coefficients, self._threshold, self._by_time = coefficients, threshold, by_time
        self._means, self._is_last = means, is_last

    def skips(self, state: StackState, block: nn.Module, given: Arguments, image: Tensor) -> bool:
        """Whether blocks are left out, where ``image`` are the tokens that the first one is given."""
        signal = given["temb"] if self._by_time else block.norm1(image, emb=given["temb"])[0]
        before, state.signal = state.signal, signal
        if before is not None and not self._is_last():
            change = self._means.decide(partial(_relative_change, signal, before), ("image",))
            state.total += _polynomial(self._coefficients, change)
            if state.total < self._threshold:
                return True
        state.total = 0.0
        return False


def _relative_change(x: Tensor, before: Tensor) -> float:
    return ((x - before).abs().mean() / before.abs().mean()).item()


def _polynomial(coefficients: tuple[float, ...], x: float) -> float:
    result = 0.0
    for coefficient in coefficients:
        result = result * x + coefficient
    return result
