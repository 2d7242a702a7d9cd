"""Placement of the text encoders' weights: on every rank, sharded over the ranks, on one rank, or offloaded."""

from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from xfuser.core.distributed import GroupCoordinator
from xfuser.core.hooks import replaced
from xfuser.weights.fsdp import Shards, free_weights, is_freed, shapes_of

PREFIX = "text_encoder"  # of text encoders' component names in Diffusers pipelines


def text_encoders(pipe: Any) -> dict[str, nn.Module]:
    """The text encoders of a pipeline, by component name."""
    parts = pipe.components.items()
    return {name: part for name, part in parts if name.startswith(PREFIX) and isinstance(part, nn.Module)}


class TextEncoders:
    """A pipeline's text encoders, placed by ``mode`` from :meth:`place` until :meth:`restore`; embeddings are the same
    in all modes.

    Args:
        mode: ``replicate``: every rank holds them. ``shard``: each rank holds a shard of their blocks. ``rank0``: the
            first rank holds them and sends their outputs to the others. ``offload``: they are on the device only while
            they encode.
        group: the ranks of the run, which encode the same prompts. In the modes shard and rank0, the encoders of ranks
            other than the first may already be freed.

    Raises:
        ValueError: the pipeline has no text encoder, was loaded for another mode, or has encoders that another wrapped
            pipeline has sharded, or placed in another mode.
    """

    def __init__(self, pipe: Any, mode: str, group: GroupCoordinator) -> None:
        self._pipe, self._group = pipe, group
        self._stack = ExitStack()
        self._shards: list[Shards] = []
        encoders = text_encoders(pipe)
        if mode != "replicate" and not encoders:
            raise ValueError(f"text_encoder={mode!r}: {type(pipe).__name__} has no text encoder; remove it")
        placed = {name: getattr(one.forward, "placement", None) for name, one in encoders.items()}
        for name, other in placed.items():
            if other == "shard" or other not in (None, mode):
                problem = f"text_encoder={mode!r}: a wrapped pipeline has {name} with text_encoder={other!r}"
                raise ValueError(f"{problem}: call unwrap() on it first")
        # Those that another wrapped pipeline has placed likewise stay as they are: a second hook would encode twice.
        encoders = {name: one for name, one in encoders.items() if placed[name] is None}
        if mode in ("replicate", "offload") and (freed := [name for name, one in encoders.items() if is_freed(one)]):
            problem = f"{type(pipe).__name__} was loaded with {freed[0]} on the first rank only"
            raise ValueError(f"text_encoder={mode!r}: {problem}; wrap it with the text_encoder that it was loaded with")
        stays = mode == "replicate" or (mode != "offload" and group.world_size == 1)
        self._mode, self._moved = mode, {} if stays else encoders

    def place(self) -> None:
        """Move the weights; all ranks must call this."""
        place = {"shard": self._shard, "rank0": self._leave_to_first, "offload": self._offload}
        for name, encoder in self._moved.items():
            place[self._mode](name, encoder)

    def changes(self) -> list[str]:
        """Changes of the sharded encoders' parameters since they were sharded."""
        return [change for shards in self._shards for change in shards.changes()]

    def restore(self) -> None:
        """Restore all weights on every rank; all ranks must call this, with memory for them."""
        self._stack.close()

    def _shard(self, name: str, encoder: nn.Module) -> None:
        shards = Shards(encoder, self._group, None, self._group.broadcast_object(shapes_of(encoder)))
        self._shards.append(shards)
        blank = list(shards.copy.parameters())
        given = [weight.detach() for weight in encoder.parameters()] if self._group.is_first_rank else blank
        shards.take(self._from_first(x, like.shape, like.dtype) for x, like in zip(given, blank, strict=True))
        vars(self._pipe)[name] = shards.copy  # without registering a component
        self._stack.callback(shards.put_back, self._pipe, name)

    def _leave_to_first(self, _: str, encoder: nn.Module) -> None:
        """Keep weights only on the first rank, whose outputs are broadcast to the other ranks."""
        forward, group = encoder.forward, self._group

        @wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            if not group.is_first_rank:
                received = group.broadcast_tensor_dict()
                return tree_unflatten([received[str(index)] for index in range(len(received) - 1)], received["tree"])
            leaves, tree = tree_flatten(forward(*args, **kwargs))
            plain = [x if isinstance(x, Tensor | bool | int | float | str) else None for x in leaves]
            group.broadcast_tensor_dict({str(index): x for index, x in enumerate(plain)} | {"tree": tree})
            return tree_unflatten(leaves, tree)

        call.placement = "rank0"
        if not group.is_first_rank:
            free_weights(encoder, group.device)
        self._stack.callback(self._refill, encoder)
        self._stack.enter_context(replaced(encoder, "forward", call))

    def _refill(self, encoder: nn.Module) -> None:
        for weight, shape in zip(encoder.parameters(), self._group.broadcast_object(shapes_of(encoder)), strict=True):
            weight.data = self._from_first(weight.detach(), *shape)

    def _from_first(self, x: Tensor, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        if not self._group.is_first_rank:
            x = torch.empty(shape, dtype=dtype, device=self._group.device)
        return self._group.broadcast(x.to(self._group.device))

    def _offload(self, _: str, encoder: nn.Module) -> None:
        """Keep the weights on the CPU, and empty parameters on the device: pipelines run on the parameters' device."""
        weights = list(encoder.parameters())
        held = [weight.detach().cpu() for weight in weights]
        forward = encoder.forward

        def fill() -> None:
            for weight, x in zip(weights, held, strict=True):
                weight.data = x.to(weight.device, weight.dtype)

        def free(on: torch.device | None = None) -> None:
            for weight in weights:
                weight.data = weight.new_empty(0, device=on or weight.device)

        @wraps(forward)
        def call(*args: Any, **kwargs: Any) -> Any:
            fill()
            try:
                return forward(*args, **kwargs)
            finally:
                free()

        call.placement = "offload"
        for part in encoder.modules():  # buffers stay on the device: they are small
            part._buffers.update({key: x.to(self._group.device) for key, x in part._buffers.items() if x is not None})
        free(self._group.device)
        self._stack.callback(fill)
        self._stack.enter_context(replaced(encoder, "forward", call))
