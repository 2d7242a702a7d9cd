"""Attention as an operator that a compiler leaves alone: what is inside of it runs as it does without a compiler.

A compiled block calls ``xfuser::attend`` in the place of ``scaled_dot_product_attention``. The graph knows the
attention module by its name within the block, which all blocks of a class have in common; which block is running is
known outside of the graph. So blocks share their graphs, and exchanges between ranks need no graph of their own.
"""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from operator import attrgetter

import torch
from torch import Tensor, nn

from xfuser.core.attention.dispatch import asked


class _Running(threading.local):
    """The compiled block whose forward this thread is in."""

    block: nn.Module | None = None


_running = _Running()


@contextmanager
def running(block: nn.Module) -> Iterator[None]:
    """Within the context, ``attend`` is of the attention modules of this block."""
    before, _running.block = _running.block, block
    try:
        yield
    finally:
        _running.block = before


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, place: str, backend: str
) -> Tensor:
    """What ``intercepted()`` has put into the forward of the running block's module at ``place``."""
    asked.backend, asked.compiled = backend, True
    try:
        out = attrgetter(place)(_running.block).forward.attend(q, k, v, mask, scale)
    finally:
        asked.backend, asked.compiled = "auto", False
    return out.transpose(1, 2).contiguous().transpose(1, 2)  # the strides that the compiler was told


def _fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, place: str, backend: str
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


_library = torch.library.Library("xfuser", "DEF")
_library.define("attend(Tensor q, Tensor k, Tensor v, Tensor? mask, float? scale, str place, str backend) -> Tensor")
_library.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("xfuser::attend", _fake, lib=_library)

attend = torch.ops.xfuser.attend.default
