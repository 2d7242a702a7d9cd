"""Computations across ranks carry no gradients: a forward runs, and ``backward()`` through it raises."""

from typing import Any

import torch
from torch import Tensor


def forward_only(out: Tensor, *inputs: Tensor | None) -> Tensor:
    """Return ``out``, computed from ``inputs`` within ``torch.no_grad()``, so that ``backward()`` through it raises.

    Collectives pass no gradients. A caller without ``torch.no_grad()`` still gets the result, but never gradients that
    silently lack a part.
    """
    inputs = [x for x in inputs if x is not None and x.requires_grad]
    return _ForwardOnly.apply(out, *inputs) if inputs and torch.is_grad_enabled() else out


class _ForwardOnly(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, *inputs: Tensor) -> Tensor:
        return out

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> None:
        raise ValueError("computation across ranks is for inference only: no gradient passes their collectives")
