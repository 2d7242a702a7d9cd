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
from xfuser.methods.pipefusion.stage import Stage
from xfuser.methods.tokens import TokenShares, Window
from xfuser.models.plan import ModelPlan, Tokens, blocks_of


class SequenceParallel:
    """Sequence parallelism (USP: Ulysses x ring) of one transformer over one group.

    With a pipeline ``stage``, a forward computes one patch of the image: the patch's tokens are what is shared.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: ModelPlan,
        group: SequenceParallelGroupCoordinator,
        backend: str = "auto",
        stage: Stage | None = None,
    ) -> None:
        self._model, self._plan, self._group, self._backend, self._stage = model, plan, group, backend, stage
        self._shares: TokenShares | None = None  # of the forward that is running, from its first block on

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the context, the transformer's blocks, attention and head work on shares."""
        with ExitStack() as stack:
            for block in blocks_of(self._model, self._plan):
                stack.enter_context(edited_arguments(block, self._enter_block))
            head = self._model.get_submodule(self._plan.head)
            stack.callback(head.register_forward_hook(self._gather).remove)
            layouts = self._attention()
            modules = {name: self._model.get_submodule(name) for name in layouts}
            stack.enter_context(intercepted(modules, lambda name: partial(self._attend, name, layouts[name])))
            yield

    def layer(self, call: Call, arguments: Arguments) -> Any:
        """The layer of the transformer's forward that opens and closes one forward's state."""
        for name in self._plan.residuals:
            if arguments.get(name) is not None:
                arguments[name] = tree_map_only(torch.Tensor, self._cut_residual, arguments[name])
        try:
            return call(arguments)
        finally:
            self._shares = None

    def _attention(self) -> dict[str, tuple[str, ...]]:
        """Streams of each attention module that this rank runs, by its name in the transformer."""
        return {
            f"{blocks}.{index}.{name}": streams
            for blocks in self._plan.blocks
            for index, block in enumerate(self._model.get_submodule(blocks))
            for name, streams in self._plan.attention.items()
            if name in dict(block.named_children())
        }

    def _enter_block(self, arguments: Arguments) -> None:
        if self._shares is None:
            self._cut_streams(arguments)
        for name, tokens in self._plan.per_token.items():
            if arguments.get(name) is not None:
                arguments[name] = tree_map_only(
                    torch.Tensor, lambda x, tokens=tokens: self._shares.cut_table(x, tokens), arguments[name]
                )

    def _cut_streams(self, arguments: Arguments) -> None:
        """Before the first block that runs: leave this rank's rows of the streams."""
        image, text = self._plan.image, self._plan.text
        count, text_count = arguments[image].shape[1], arguments[text].shape[1] if text else 0
        window = self._stage.window(count) if self._stage else Window(range(count))
        rank, ranks = (self._group.rank_in_group, self._group.world_size) if self._splits(count) else (0, 1)
        self._shares = TokenShares(rank, ranks, count, text_count, window)
        if self._stage:
            self._stage.entered(self._shares)
        arguments[image] = self._shares.cut(arguments[image], Tokens(("image",)))
        if text:
            arguments[text] = self._shares.cut(arguments[text], Tokens(("text",)))

    def _splits(self, tokens: int) -> bool:
        """Fewer tokens than ranks stay whole on every rank: blocks need not bear having none."""
        return (self._stage.smallest_window(tokens) if self._stage else tokens) >= self._group.world_size

    def _cut_residual(self, x: torch.Tensor) -> torch.Tensor:
        if not self._splits(x.shape[1]):
            return x
        return x.split(split_sizes(x.shape[1], self._group.world_size), dim=1)[self._group.rank_in_group]

    def _gather(self, module: nn.Module, args: tuple, output: torch.Tensor) -> torch.Tensor:
        """Behind the head: all tokens of the image; zeros where this forward or this stage computes none."""
        shares = self._shares
        if shares is None or shares.is_whole:
            return output
        whole = output.new_zeros(output.shape[0], shares.totals["image"], output.shape[2])
        if self._stage and not self._stage.is_last:
            return whole
        if shares.ranks > 1:
            output = self._group.all_gather(output, dim=1, sizes=shares.sizes["image"])
        whole[:, shares.window.image.start : shares.window.image.stop] = output
        return whole

    def _attend(
        self,
        name: str,
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
        shares = self._shares
        if shares.is_whole and not self._stage:
            return attention(query, key, value, attn_mask, scale, self._backend)
        lengths = shares.lengths(streams)
        mine = lengths[shares.rank]
        if (query.shape[2], key.shape[2]) != (mine, mine):
            raise ValueError(
                f"attention got {query.shape[2]} queries and {key.shape[2]} keys where this rank holds {mine} tokens"
                f" of {'+'.join(streams)}: the transformer's plan does not fit this call"
            )
        mask = None if attn_mask is None else _key_mask(attn_mask, mine, query.dtype)
        renew = partial(self._stage.renew, name, shares, streams) if self._stage else None
        if shares.ranks == 1:
            return attention(query, *renew(key, value, mask), scale, self._backend)
        return usp_attention(
            query, key, value, lengths, self._group, mask=mask, scale=scale, backend=self._backend, renew=renew
        )


def _key_mask(mask: torch.Tensor, keys: int, dtype: torch.dtype) -> torch.Tensor:
    """An additive ``[B|1, H|1, 1, keys]`` mask from one that SDPA takes."""
    mask = mask[(None,) * (4 - mask.dim())]
    if mask.stride(2) == 0:
        mask = mask[:, :, :1]
    if mask.shape[2] > 1 or mask.shape[3] != keys:
        raise ValueError(
            f"an attention mask of shape {tuple(mask.shape)}: sequence parallelism and PipeFusion take masks over the"
            f" keys of this forward alone, [B, 1, 1, {keys}]; one that differs between queries cannot be split"
        )
    if mask.dtype == torch.bool:
        return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)
    return mask
