"""Linear attention over tokens that lie on several ranks: the state that it sums over the tokens is summed over ranks.

Attention without softmax, ``(V K^T) Q``, is linear in a state as large as a head (arXiv 2006.16236; in Sana, arXiv
2410.10629).
"""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

PRODUCTS = (torch.matmul, Tensor.matmul, Tensor.__matmul__)
SUMS = (torch.sum, Tensor.sum)


# Takes a state, and what computes that of some tokens alone: of so many from one of these.
Complete = Callable[[Tensor, Callable[[int, int], Tensor]], Tensor]


class _FirstProduct(TorchFunctionMode):
    """Hands the result of the first ``matmul``, over the tokens, to ``complete``.

    So it does with a ``sum`` ahead of it, of the keys, whose product with the queries is then the first, and no state.
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
    """The forward of a linear attention with ``complete`` making the whole state of that of this rank's tokens.

    In a forward, it raises a ValueError where the module's processor multiplies no matrices by ``torch.matmul``.
    """
    original = module.forward

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        with _FirstProduct(complete) as mode:
            output = original(*args, **kwargs)
        if not mode.done:
            processor = type(getattr(module, "processor", module)).__name__
            raise ValueError(f"{processor} is not the linear attention that the transformer's plan is made for")
        return output

    return forward
