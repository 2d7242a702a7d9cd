"""Make all ranks call a pipeline with the same arguments, and with rank 0's random states and tensors."""

import copy
import hashlib
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils._pytree import keystr, tree_flatten_with_path, tree_unflatten

from xfuser.core import device as devices
from xfuser.core.distributed import get_world_group

# Arguments that concern only what a rank returns, what its callback gets, and where it computes.
OWN = {"return_dict", "output", "callback_on_step_end_tensor_inputs", "callback_steps", "device"}


def shared_arguments(args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]]:
    """Copy rank 0's random states and tensors to all ranks; returns the arguments with the copied tensors.

    The states are those of torch's default generators and of generators in the arguments. The tensors are those in the
    arguments, including the state of a modular pipeline; only tensors that differ are sent and replaced.

    Raises:
        ValueError: on all ranks, if they were given different texts, numbers, images or generators, or tensors of
            different shapes or dtypes.
    """
    world = get_world_group()
    states = {name: x for name, x in kwargs.items() if isinstance(getattr(x, "values", None), dict)}
    opened = kwargs | {name: x.values for name, x in states.items()}
    leaves, spec = tree_flatten_with_path((args, dict(sorted(opened.items()))))
    generators = {keystr(path): x for path, x in leaves if isinstance(x, torch.Generator)}
    tensors = {keystr(path): x for path, x in leaves if isinstance(x, torch.Tensor)}
    kinds = {keystr(path): value for path, x in leaves if not _is_own(path, x) and (value := _value(x)) is not None}
    kinds |= dict.fromkeys(generators, "a generator")
    kinds |= {name: f"{x.dtype} of shape {tuple(x.shape)}" for name, x in tensors.items()}
    given = world.all_gather_object((kinds, {name: _digest(x) for name, x in tensors.items()}))
    _refuse_differences([kinds for kinds, _ in given])
    defaults, own = world.broadcast_object((devices.rng_states(), [one.get_state() for one in generators.values()]))
    devices.set_rng_states(defaults)
    for generator, state in zip(generators.values(), own, strict=True):
        generator.set_state(state)
    differ = {name for _, theirs in given for name in theirs if theirs[name] != given[0][1][name]}
    values = [
        world.broadcast(x.to(world.device, copy=True)).to(x.device) if keystr(path) in differ else x
        for path, x in leaves
    ]
    args, kwargs = tree_unflatten(values, spec)
    for name, state in states.items():
        values, kwargs[name] = kwargs[name], copy.copy(state)
        kwargs[name].values = values
    return args, kwargs


def _refuse_differences(given: list[dict[str, str]]) -> None:
    """Raise a ValueError unless all ranks give the same arguments; ``given`` describes them by name, per rank."""
    for rank, theirs in enumerate(given):
        differ = [name for name in sorted(theirs | given[0]) if theirs.get(name) != given[0].get(name)]
        if differ:
            told = [f"{name} is {given[0].get(name)} on rank 0, {theirs.get(name)} on rank {rank}" for name in differ]
            raise ValueError(
                f"the ranks call the pipeline with different arguments ({'; '.join(told)}): on all ranks, pass the same"
                " values, and tensors of the same shapes and types"
            )


def _is_own(path: tuple, x: Any) -> bool:
    """Whether the argument at this path may differ between ranks. All decode, or none does: they share the images."""
    names = {getattr(key, "key", None) for key in path}
    return bool(names & OWN) or ("output_type" in names and x != "latent")


def _value(x: Any) -> str | None:
    """A text or number, or a hash of an image or array; None for all else."""
    if isinstance(x, str | int | float):
        return repr(x)
    if isinstance(x, Image.Image) or (isinstance(x, np.ndarray | np.generic) and not x.dtype.hasobject):
        return f"{type(x).__name__} with the hash {hashlib.blake2b(x.tobytes(), digest_size=4).hexdigest()}"
    return None


def _digest(x: torch.Tensor) -> bytes:
    """A hash of a tensor's values."""
    return hashlib.blake2b(x.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy(), digest_size=16).digest()
