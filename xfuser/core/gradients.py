"""What ranks compute together carries no gradients: forwards run as they are, and ``backward()`` through one raises."""

from typing import Any

import torch
from torch import Tensor


def forward_only(out: Tensor, *inputs: Tensor | None) -> Tensor:
    """``out``, which was computed from ``inputs`` within ``torch.no_grad()``, by collectives that no gradient passes.

    A caller who forgot ``torch.no_grad()`` gets the result; gradients that silently lack a part are never computed.
    """
    inputs = [x for x in inputs if x is not None and x.requires_grad]
    return _ForwardOnly.apply(out, *inputs) if inputs and torch.is_grad_enabled() else out


class _ForwardOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, *inputs: Tensor) -> Tensor:
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise ValueError("what ranks compute together is for inference: no gradient passes their collectives")
