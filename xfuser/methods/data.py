"""Data parallelism: each replica computes its own images of the batch.

The pipeline itself runs whole on every rank, so noise, schedulers and callbacks see the full batch and the result
equals serial for every scheduler. What costs time is split: each forward of the transformer, and the VAE's decode.
"""

from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import torch

from xfuser.core.distributed import GroupCoordinator
from xfuser.core.hooks import Binder, replaced
from xfuser.core.randomness import RandomWatch
from xfuser.methods.forward import Call, Layer
from xfuser.methods.rows import split_rows
from xfuser.models.plan import ModelPlan


def data_parallel(group: GroupCoordinator, plan: ModelPlan) -> Layer:
    """The layer of a transformer's forward that splits its batch over the replicas."""

    def layer(call: Call, arguments: dict[str, Any]) -> Any:
        return split_rows(group, len(arguments[plan.latents]), call, arguments, plan)

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
