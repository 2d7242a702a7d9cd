"""Data parallelism: each replica computes its own images of the batch.

The pipeline itself runs whole on every rank, so noise, schedulers and callbacks see the full batch and the result
equals serial for every scheduler. What costs time is split: each forward of the transformer, and the VAE's decode.
"""

from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

from xfuser.core.distributed import GroupCoordinator
from xfuser.core.hooks import replaced
from xfuser.methods.forward import Call, Layer
from xfuser.methods.rows import split_rows
from xfuser.models.plan import ModelPlan


def data_parallel(group: GroupCoordinator, plan: ModelPlan) -> Layer:
    """The layer of a transformer's forward that splits its batch over the replicas."""

    def layer(call: Call, arguments: dict[str, Any]) -> Any:
        return split_rows(group, len(arguments[plan.latents]), call, arguments, plan)

    return layer


def split_decode(vae: Any, group: GroupCoordinator) -> AbstractContextManager[None]:
    """Within the context, ``vae.decode`` splits its batch over the group and returns the whole."""
    original = vae.decode

    @wraps(original)
    def decode(*args: Any, **kwargs: Any) -> Any:
        latents = args[0] if args else next(iter(kwargs.values()))

        def call(local: dict[str, Any]) -> Any:
            return original(*local["args"], **local["kwargs"])

        return split_rows(group, latents.shape[0], call, {"args": args, "kwargs": kwargs})

    return replaced(vae, "decode", decode)
