"""Data parallelism: each replica computes its own images of the batch.

The pipeline itself runs whole on every rank, so noise, schedulers and callbacks see the full batch and the result
equals serial for every scheduler. What costs time is split: each forward of the transformer, and the VAE's decode.
"""

from collections.abc import Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import wraps
from typing import Any

import torch
from torch import nn

from xfuser.call import CallState, Forward, Layer
from xfuser.core.distributed import GroupCoordinator
from xfuser.core.hooks import Arguments, Binder, replaced
from xfuser.core.randomness import RandomWatch
from xfuser.methods.rows import split_rows
from xfuser.models.plan import ModelPlan


class DataParallel:
    """The batch of each forward is split over the replicas, whose ranks are a group."""

    def __init__(self, group: GroupCoordinator, models: Iterable[tuple[nn.Module, ModelPlan]]) -> None:
        self._group, self._models = group, models

    @contextmanager
    def enter(self, call: CallState) -> Iterator[None]:
        """Within the context, each replica computes its own images."""
        for model, plan in self._models:
            call.around(model, self._layer(plan))
        yield

    def _layer(self, plan: ModelPlan) -> Layer:
        def layer(forward: Forward, arguments: Arguments) -> Any:
            return split_rows(self._group, len(arguments[plan.latents]), forward, arguments, plan)

        return layer


def split_decode(vae: Any, group: GroupCoordinator) -> AbstractContextManager[None]:
    """Within the context, ``vae.decode`` splits its batch over the group and returns the whole.

    It does so where rows are known to be independent: all that the call says of them are tensors with an entry for
    each, and no random number is drawn. Otherwise every rank decodes them all.
    """
    original = vae.decode
    bind = Binder(original)

    @wraps(original)
    def decode(*args: Any, **kwargs: Any) -> Any:
        arguments = bind(args, kwargs)
        latents = next(iter(arguments.values()))
        if not all(_is_by_row(value, len(latents)) for value in arguments.values()):
            return original(*args, **kwargs)
        try:
            with RandomWatch(_refuse):
                return split_rows(group, len(latents), lambda own: original(**own), arguments)
        except _DrawsError:  # on all ranks alike, and before the first number is drawn
            return original(*args, **kwargs)

    return replaced(vae, "decode", decode)


class _DrawsError(Exception):
    """Random numbers are about to be drawn."""


def _refuse(operator: str) -> None:
    raise _DrawsError(operator)


def _is_by_row(value: Any, rows: int) -> bool:
    """Whether an argument says nothing of rows, or has an entry for each: a number may say how many belong together."""
    if isinstance(value, torch.Tensor):
        return value.dim() > 0 and len(value) == rows
    return value is None or isinstance(value, bool | torch.Generator)
