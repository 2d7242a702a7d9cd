"""Data parallelism: each replica computes its own images of the batch.

The pipeline runs on every rank with the whole batch, so noise, schedulers and callbacks see all of it, and the result
equals serial for every scheduler. Only the slow parts are split: each forward of the transformer, and the VAE's decode.
"""

from collections.abc import Iterable
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any

import torch
from torch import nn

from xfuser.call import CallState, Forward
from xfuser.core.distributed import GroupCoordinator
from xfuser.core.hooks import Arguments, Binder, replaced
from xfuser.core.randomness import RandomWatch
from xfuser.methods.batch import split_batch
from xfuser.methods.perturbed import Perturbed
from xfuser.models.plan import ModelPlan


class DataParallel:
    """Splits the batch of each forward over a group with one rank of each replica.

    Args:
        models: the pipeline's transformers with their plans.
        pipe: the pipeline.
    """

    def __init__(self, group: GroupCoordinator, models: Iterable[tuple[nn.Module, ModelPlan]], pipe: Any) -> None:
        self._group, self._models, self._pipe = group, models, pipe

    def enter(self, call: CallState) -> None:
        """During the call, each replica computes its own images."""
        for model, plan in self._models:
            call.around(model, partial(self._wrapper, plan, Perturbed(self._pipe, model), call))

    def _wrapper(
        self, plan: ModelPlan, perturbed: Perturbed, call: CallState, forward: Forward, arguments: Arguments
    ) -> Any:
        batch, branches = len(arguments[plan.latents]), perturbed.branches
        return split_batch(self._group, batch, forward, arguments, plan, call, branches)


def split_decode(vae: Any, group: GroupCoordinator) -> AbstractContextManager[None]:
    """Within the context, ``vae.decode`` splits its batch over the group and returns all of it.

    It splits the batch only if its entries are known to be independent: all arguments about them are tensors with one
    item per entry, and no random number is drawn. Otherwise every rank decodes the whole batch.
    """
    original = vae.decode
    bind = Binder(original)

    @wraps(original)
    def decode(*args: Any, **kwargs: Any) -> Any:
        arguments = bind(args, kwargs)
        latents = next(iter(arguments.values()))
        if not all(_by_entry(value, len(latents)) for value in arguments.values()):
            return original(*args, **kwargs)
        try:
            with RandomWatch(_refuse):
                return split_batch(group, len(latents), lambda own: original(**own), arguments)
        except _DrawsError:  # on all ranks alike, before the first number is drawn
            return original(*args, **kwargs)

    return replaced(vae, "decode", decode)


class _DrawsError(Exception):
    """Random numbers are about to be drawn."""


def _refuse(operator: str) -> None:
    raise _DrawsError(operator)


def _by_entry(value: Any, batch: int) -> bool:
    """Whether an argument has one item per entry, or is not about entries.

    A number may be about them: it may count the entries that belong together.
    """
    if isinstance(value, torch.Tensor):
        return value.dim() > 0 and len(value) == batch
    return value is None or isinstance(value, bool | torch.Generator)
