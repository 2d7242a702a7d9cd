"""Stage communication of accelerator tensors on the host, over gloo: for ranks that share one GPU."""

from collections.abc import Callable
from contextlib import ExitStack
from functools import partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import distributed_c10d as c10d
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

MESSAGES = ("send", "recv_")


class Staged(TorchDispatchMode):
    """Within the context, torch.distributed communicates accelerator tensors as copies on the host."""

    def __init__(self) -> None:
        super().__init__()
        self._stack = ExitStack()
        self._copies: list[tuple[Tensor, Tensor]] = []  # of the last message: on the accelerator, on the host

    def __enter__(self) -> "Staged":
        for name in ("isend", "irecv", "recv"):
            staged = partial(self._message, getattr(dist, name))
            for module in (dist, c10d):
                self._stack.enter_context(mock.patch.object(module, name, staged))
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._stack.close()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor) and x.device.type != "cpu"]
        if func.namespace != "c10d" or not given:
            return func(*args, **kwargs)
        copies = {id(x): x.cpu().contiguous() for x in given}
        args, kwargs = tree_map_only(Tensor, lambda x: copies.get(id(x), x), (args, kwargs))
        result = func(*args, **kwargs)
        name = func._schema.name.partition("::")[2]
        # Keep the copy of a sent tensor until it has been sent; it is copied onto itself, so nothing is copied back.
        self._copies = [(copies[id(x)] if name == "send" else x, copies[id(x)]) for x in given]
        if name not in MESSAGES:
            for leaf in tree_leaves(result):
                if isinstance(leaf, torch.ScriptObject):
                    dist.Work.unbox(leaf).wait()
            self._take_back()
        back = {id(copies[id(x)]): x for x in given}
        return tree_map_only(Tensor, lambda x: back.get(id(x), x), result)

    def _take_back(self) -> None:
        for x, copy in self._copies:
            x.copy_(copy)
        self._copies = []

    def _message(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Replace a function that sends or receives."""
        self._copies = []
        work = original(*args, **kwargs)
        if not isinstance(work, dist.Work):  # a blocking call
            self._take_back()
            return work
        return _Handle(work, self._copies)


class _Handle:
    """Work handle of a message in flight: wait() copies received data to the accelerator."""

    def __init__(self, work: dist.Work, copies: list[tuple[Tensor, Tensor]]) -> None:
        self._work, self._copies = work, copies

    def wait(self, *args: Any) -> bool:
        done = self._work.wait(*args)
        for x, copy in self._copies:
            x.copy_(copy)
        self._copies = []
        return done
