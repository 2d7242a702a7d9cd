"""Sequence parallelism: each rank holds a share of the tokens of every stream; attention sees them all."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_map_only

from xfuser.core.attention.intercept import intercepted
from xfuser.core.attention.kernels import attention
from xfuser.core.attention.usp import usp_attention
from xfuser.core.distributed import SequenceParallelGroupCoordinator
from xfuser.core.distributed.utils import split_sizes
from xfuser.methods.forward import Arguments, Call, edited_arguments
from xfuser.models.plan import ModelPlan, Tokens


class TokenShares:
    """Which rows of each stream the ranks hold during one forward: consecutive ones, in rank order."""

    def __init__(self, group: SequenceParallelGroupCoordinator, image: int, text: int) -> None:
        self._rank = group.rank_in_group
        # The streams' longer shares lie at opposite ends of the group, which evens the totals out.
        self.sizes = {
            "image": split_sizes(image, group.world_size),
            "text": split_sizes(text, group.world_size)[::-1],
        }
        self._tables: dict[tuple[int, Tokens], tuple[torch.Tensor, torch.Tensor]] = {}

    def lengths(self, streams: tuple[str, ...]) -> list[int]:
        """Rows of each rank in a sequence made of these streams."""
        return [sum(counts) for counts in zip(*(self.sizes[stream] for stream in streams), strict=True)]

    def cut_table(self, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """As :meth:`cut`, for a tensor that every block is given anew: cut once, then remembered."""
        key = (id(x), tokens)
        if key not in self._tables:
            self._tables[key] = x, self.cut(x, tokens)
        return self._tables[key][1]

    def cut(self, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """This rank's rows of a tensor that holds the whole streams."""
        totals = [sum(self.sizes[stream]) for stream in tokens.streams]
        if x.shape[tokens.dim] != sum(totals):
            raise ValueError(
                f"a per-token argument of shape {tuple(x.shape)} has {x.shape[tokens.dim]} entries along dimension"
                f" {tokens.dim}, where {'+'.join(tokens.streams)} have {'+'.join(map(str, totals))} tokens"
            )
        parts = [
            whole.split(self.sizes[stream], dim=tokens.dim)[self._rank]
            for stream, whole in zip(tokens.streams, x.split(totals, dim=tokens.dim), strict=True)
        ]
        return torch.cat(parts, dim=tokens.dim)


class SequenceParallel:
    """Sequence parallelism (USP: Ulysses x ring) of one transformer over one group."""

    def __init__(
        self,
        model: nn.Module,
        plan: ModelPlan,
        group: SequenceParallelGroupCoordinator,
        backend: str = "auto",
    ) -> None:
        self._model, self._plan, self._group, self._backend = model, plan, group, backend
        self._before_blocks = False
        self._shares: TokenShares | None = None  # of the forward that is running; None where it is not split

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the context, the transformer's blocks, attention and head work on shares."""
        with ExitStack() as stack:
            for block in self._blocks():
                stack.enter_context(edited_arguments(block, self._enter_block))
            head = self._model.get_submodule(self._plan.head)
            stack.callback(head.register_forward_hook(self._gather).remove)
            layouts = self._attention()
            modules = {name: self._model.get_submodule(name) for name in layouts}
            stack.enter_context(intercepted(modules, lambda name: partial(self._attend, layouts[name])))
            yield

    def layer(self, call: Call, arguments: Arguments) -> Any:
        """The layer of the transformer's forward that opens and closes one forward's state."""
        for name in self._plan.residuals:
            if arguments.get(name) is not None:
                arguments[name] = tree_map_only(torch.Tensor, self._cut_residual, arguments[name])
        self._before_blocks = True
        try:
            return call(arguments)
        finally:
            self._shares = None

    def _blocks(self) -> list[nn.Module]:
        return [block for name in self._plan.blocks for block in self._model.get_submodule(name)]

    def _attention(self) -> dict[str, tuple[str, ...]]:
        """Streams of each attention module, by its name in the transformer."""
        return {
            f"{blocks}.{index}.{name}": streams
            for blocks in self._plan.blocks
            for index, block in enumerate(self._model.get_submodule(blocks))
            for name, streams in self._plan.attention.items()
            if getattr(block, name, None) is not None
        }

    def _enter_block(self, arguments: Arguments) -> None:
        if self._before_blocks:
            self._before_blocks = False
            self._cut_streams(arguments)
        for name, tokens in self._plan.per_token.items():
            if self._shares and arguments.get(name) is not None:
                arguments[name] = tree_map_only(
                    torch.Tensor, lambda x, tokens=tokens: self._shares.cut_table(x, tokens), arguments[name]
                )

    def _cut_streams(self, arguments: Arguments) -> None:
        """Before the first block that runs: leave this rank's rows of the streams."""
        image, text = self._plan.image, self._plan.text
        if not self._splits(arguments[image]):
            return
        text_rows = arguments[text].shape[1] if text else 0
        self._shares = TokenShares(self._group, arguments[image].shape[1], text_rows)
        arguments[image] = self._shares.cut(arguments[image], Tokens(("image",)))
        if text:
            arguments[text] = self._shares.cut(arguments[text], Tokens(("text",)))

    def _splits(self, tokens: torch.Tensor) -> bool:
        """Fewer image tokens than ranks stay whole on every rank: blocks need not bear having none."""
        return tokens.shape[1] >= self._group.world_size

    def _cut_residual(self, x: torch.Tensor) -> torch.Tensor:
        if not self._splits(x):
            return x
        return x.split(split_sizes(x.shape[1], self._group.world_size), dim=1)[self._group.rank_in_group]

    def _gather(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        if self._shares is None:
            return output
        return self._group.all_gather(output, dim=1, sizes=self._shares.sizes["image"])

    def _attend(
        self,
        streams: tuple[str, ...],
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Stands in for ``scaled_dot_product_attention`` (``[B, H, S_local, D]``)."""
        if is_causal or dropout_p:
            raise ValueError(
                f"sequence parallelism takes neither causal attention (is_causal={is_causal}) nor dropout"
                f" (dropout_p={dropout_p}): put the model in eval mode"
            )
        if self._shares is None:
            return attention(query, key, value, attn_mask, scale, self._backend)
        lengths = self._shares.lengths(streams)
        mine = lengths[self._group.rank_in_group]
        if (query.shape[2], key.shape[2]) != (mine, mine):
            raise ValueError(
                f"attention got {query.shape[2]} queries and {key.shape[2]} keys where this rank holds {mine} tokens"
                f" of {'+'.join(streams)}: the transformer's plan does not fit this call"
            )
        mask = None if attn_mask is None else _key_mask(attn_mask, mine, query.dtype)
        return usp_attention(query, key, value, lengths, self._group, mask=mask, scale=scale, backend=self._backend)


def _key_mask(mask: torch.Tensor, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """An additive ``[B|1, H|1, 1, keys]`` mask from one that SDPA takes."""
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.stride(2) == 0:
        mask = mask[:, :, :1]
    if mask.shape[2] > 1 or mask.shape[3] != keys:
        raise ValueError(
            f"an attention mask of shape {tuple(mask.shape)}: sequence parallelism takes masks over the keys of this"
            f" rank alone, [B, 1, 1, {keys}]; one that differs between queries cannot be split over ranks"
        )
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    return mask
