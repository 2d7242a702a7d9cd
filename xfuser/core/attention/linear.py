"""Linear attention over tokens sharded over ranks: its state, a sum over the tokens, is summed over the ranks.

Attention without softmax, ``(V K^T) Q``, needs only a state ``V K^T`` per head, whose size does not depend on the
number of tokens (arXiv 2006.16236; in Sana, arXiv 2410.10629).
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
SUMS = (torch.sum, Tensor.sum)


# Takes this rank's state and ``part(start, count)``, which computes the state of some tokens; returns the whole state.
Complete = Callable[[Tensor, Callable[[int, int], Tensor]], Tensor]


class _FirstProduct(TorchFunctionMode):
    """Passes the result of the first ``matmul``, a sum over the tokens, to ``complete``.

    A ``sum`` of the keys before it is passed, too. The next ``matmul`` then multiplies that sum by the queries: its
    result is not a state, and is left unchanged.
    """

    def __init__(self, complete: Complete) -> None:
        super().__init__()
        self._complete = complete
        self.done = self._summed = False

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.done or func not in (*SUMS, *PRODUCTS):
            return result
        if func in PRODUCTS and self._summed:
            self._summed = False
            return result
        self._summed, self.done = func in SUMS, func in PRODUCTS

        def part(start: int, count: int) -> Tensor:
            first, *others = args
            if func in PRODUCTS:
                others = [others[0].narrow(-2, start, count)]
            return func(first.narrow(-1, start, count), *others, **(kwargs or {}))

        return self._complete(result, part)


def summed_state(module: nn.Module, complete: Complete) -> Callable[..., Any]:
    """A linear attention's forward in which ``complete`` turns the state of this rank's tokens into the whole state.

    The forward raises a ValueError if the module's processor never calls ``torch.matmul``.
    """
    original = module.forward

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _FirstProduct(complete) as mode:
            output = original(*args, **kwargs)
        if not mode.done:
            processor = type(getattr(module, "processor", module)).__name__
            raise ValueError(f"{processor} is not the linear attention that the transformer's plan describes")
        return output

    return forward
