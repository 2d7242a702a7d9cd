"""Custom operators that a compiler does not trace: the code inside them runs as it does without a compiler.

A compiled block calls ``xfuser::attend`` instead of ``scaled_dot_product_attention``. The graph identifies the
attention module by its name within the block, which is the same for all blocks of a class; which block is running is
recorded outside of the graph. So blocks share their graphs, and exchanges between ranks are not part of any graph.
``xfuser::run`` does the same for a module that is hooked as a whole.
"""

import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn

from xfuser.core.attention.dispatch import asked


class _Running(threading.local):
    """The compiled block whose forward this thread is running."""

    block: nn.Module | None = None


_running = _Running()


@contextmanager
def running(block: nn.Module) -> Iterator[None]:
    """Within the context, the operators act on modules of this block."""
    before, _running.block = _running.block, block
    try:
        yield
    finally:
        _running.block = before


def _attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, place: str, backend: str
) -> Tensor:
    """Call what ``intercepted()`` stored at ``place``: an attribute of the forward of a module in the running block."""
    asked.backend, asked.compiled = backend, True
    try:
        out = attrgetter(place)(_running.block)(q, k, v, mask, scale)
    finally:
        asked.backend, asked.compiled = "auto", False
    return out.transpose(1, 2).contiguous().transpose(1, 2)  # the strides that _fake reports to the compiler


def _fake(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, place: str, backend: str
) -> Tensor:
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]).transpose(1, 2)


def _run(x: Tensor, others: list[Tensor], names: list[str], place: str) -> Tensor:
    """Call the forward given to :func:`outside_of_graphs` for the running block's module at ``place``."""
    given: dict[str, Any] = {}
    for name, other in zip(names, others, strict=True):
        given[name] = (*given[name], other) if name in given else (other,)
    given = {name: some if len(some) > 1 else some[0] for name, some in given.items()}
    return attrgetter(place)(_running.block).forward.outside(x, **given).contiguous()


def _fake_run(x: Tensor, others: list[Tensor], names: list[str], place: str) -> Tensor:
    return x.new_empty(x.shape)


try:  # A CUDA graph would replay the kernels of one run, and not run the operators' code again.
    _outside_of_cuda_graphs = (torch.Tag.cudagraph_unsafe,)
except AttributeError:  # an older torch
    _outside_of_cuda_graphs = ()

_library = torch.library.Library("xfuser", "DEF")
_library.define(
    "attend(Tensor q, Tensor k, Tensor v, Tensor? mask, float? scale, str place, str backend) -> Tensor",
    tags=_outside_of_cuda_graphs,
)
_library.impl("attend", _attend, "CompositeExplicitAutograd")
torch.library.register_fake("xfuser::attend", _fake, lib=_library)

_library.define("run(Tensor x, Tensor[] others, str[] names, str place) -> Tensor", tags=_outside_of_cuda_graphs)
_library.impl("run", _run, "CompositeExplicitAutograd")
torch.library.register_fake("xfuser::run", _fake_run, lib=_library)

attend, run = torch.ops.xfuser.attend.default, torch.ops.xfuser.run.default


def outside_of_graphs(forward: Callable[..., Tensor], place: str) -> Callable[..., Tensor]:
    """Wrap ``forward``, of the module at ``place`` in a block, so that it is not part of the block's graph.

    It must return a tensor of the same shape as its first argument. If another argument is not None, a tensor, or a
    tuple of several tensors, the graph of a compiled block breaks.
    """
    breaking, names = torch.compiler.disable(forward), tuple(inspect.signature(forward).parameters)

    @wraps(forward)
    def outside(*args: Any, **kwargs: Any) -> Tensor:
        if not torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        given = dict(zip(names, args, strict=False)) | kwargs
        x = given.pop(names[0])
        parts = {name: value if isinstance(value, tuple) else (value,) for name, value in given.items()}
        flat = [(name, one) for name, some in parts.items() for one in some if one is not None]
        if not all(isinstance(one, Tensor) for _, one in flat):
            return breaking(*args, **kwargs)
        return run(x, [one for _, one in flat], [name for name, _ in flat], place)

    outside.outside = forward
    return outside
