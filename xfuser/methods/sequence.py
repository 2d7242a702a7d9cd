"""Sequence parallelism: each rank holds a share of the tokens of every stream; attention sees all tokens."""

import math
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from xfuser.call import Forward
from xfuser.core.attention.kernels import additive
from xfuser.core.attention.linear import summed_state
from xfuser.core.attention.operator import outside_of_graphs
from xfuser.core.attention.usp import usp_attention
from xfuser.core.distributed import SequenceParallelGroupCoordinator
from xfuser.core.hooks import Arguments, edited_arguments, edited_output, replaced
from xfuser.methods.distrifusion import DistriFusion
from xfuser.methods.masks import PairMasks, cut_pairs, segment_mask
from xfuser.methods.mixing import MixingModules
from xfuser.methods.naive_patch import NaivePatches
from xfuser.methods.pipefusion.patches import Patches
from xfuser.methods.pipefusion.pipefusion import PipeFusion
from xfuser.methods.pipefusion.stage import first_of
from xfuser.methods.tokens import Rows, TokenShares, Window
from xfuser.models.plan import PICTURE, Attention, ModelPlan, Streams, Tokens, attentions_of, blocks_of


class SequenceParallel(MixingModules):
    """Sequence parallelism (USP: Ulysses x ring) of one transformer over one group.

    With ``pipefusion``, a forward computes one patch of the image, and the patch's tokens are sharded. With ``parts``,
    these define what attention sees of other ranks' tokens, and neither Ulysses nor ring is used.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: ModelPlan,
        group: SequenceParallelGroupCoordinator,
        backend: str = "auto",
        pipefusion: PipeFusion | None = None,
        parts: DistriFusion | NaivePatches | None = None,
    ) -> None:
        super().__init__(model, plan, group, backend)
        alone = group.world_size == 1 and not pipefusion  # then all attention is local
        self.many, self.idle = alone or plan.whole or plan.many, plan.idle
        self._pipefusion, self._stage = pipefusion, None
        self._parts, self._alone = parts, isinstance(parts, NaivePatches)
        self._patches = Patches(1, getattr(model, "config", model), plan)
        self._pair_masks = PairMasks(type(model).__name__)
        self._reset()

    def _reset(self) -> None:
        """Clear the state of one forward."""
        self._early = self._plan.head is None  # whether tokens are gathered after the last block
        self._attended: dict[str, int] = {}  # number of attention calls of each module
        self._starts: Tensor | None = None  # text tokens before the image, [B, 1], if they differ by batch entry
        self._cuts: dict[tuple[str, str, int], tuple[Any, Any]] = {}  # arguments that blocks share, and their shards

    def _hooks(self) -> Iterator[AbstractContextManager[None]]:
        self._stage = self._pipefusion and self._pipefusion.stage_of(self._model)
        plan, blocks = self._plan, blocks_of(self._model, self._plan)
        yield self._pair_masks.alike()
        for block in blocks:
            yield edited_arguments(block.module, partial(self._enter_block, block.list_name))
            if plan.whole and self._stage:
                yield edited_output(block.module, partial(self._leave_block, plan.outputs(block.list_name)))
            for name in plan.convolutions:
                module = block.module.get_submodule(name)
                yield replaced(module, "forward", outside_of_graphs(self._on_rows(module), name))
            for name in plan.linear:
                module = block.module.get_submodule(name)
                state = partial(self._state, f"{block.list_name}.{block.index}.{name}")
                yield replaced(module, "forward", outside_of_graphs(summed_state(module, state), name))
        yield from self._gathering()
        yield edited_output(blocks[-1].module, partial(self._leave_blocks, plan.outputs(blocks[-1].list_name)))
        if plan.head:
            yield edited_output(self._model.get_submodule(plan.head), self._leave_head)

    def _attention_places(self) -> dict[str, str]:
        self._attentions = attentions_of(self._model, self._plan)
        blocks = [f"{block.list_name}.{block.index}." for block in blocks_of(self._model, self._plan)]
        places = {f"{block}{place}": place for block in blocks for place in self._plan.attention}
        return {name: places[name] for name in self._attentions}

    def _wrapper(self, forward: Forward, arguments: Arguments) -> Any:
        given = [name for name in self._plan.by_number if arguments.get(name) is not None]
        if given and (self._stage or self._group.world_size > 1):
            raise ValueError(
                f"sequence parallelism and PipeFusion do not support {given[0]}={arguments[given[0]]!r} of"
                f" {type(self._model).__name__}, whose blocks then select tokens by index: remove it, or use"
                " CFG or data parallelism"
            )
        latents = first_of(arguments[self._plan.latents]) if self._stage else arguments[self._plan.latents]
        text = self._plan.text_first and arguments[self._plan.text_first]
        self._starts = text.sum(dim=1, keepdim=True) if isinstance(text, Tensor) else None
        rows = columns = 1
        if isinstance(latents, Tensor):
            self._image_tokens, rows = self._patches.image_tokens(latents), self._patches.row_count(latents)
            columns = self._image_tokens // rows
        self._lines = self._parts.lines(rows, columns) if self._parts else 1
        self._unit = columns if self._plan.rows else self._lines
        if self._plan.rows and self._lines > 1:
            raise ValueError(f"the blocks of {type(self._model).__name__} require whole rows: use split_scheme='row'")
        for name in self._plan.residuals:
            if arguments.get(name) is not None:
                arguments[name] = tree_map_only(Tensor, self._cut_residual, arguments[name])
        try:
            return forward(arguments)
        finally:
            self._reset()

    def _enter_block(self, blocks: str, arguments: Arguments) -> None:
        begins = self._call.tokens is None
        if begins:
            self._call.tokens = self._share(blocks, arguments)
        shards = self._call.tokens
        for name, streams in self._plan.carriers(blocks).items():
            dim, x = self._plan.carrier_dim, arguments.get(name)
            if x is not None and x.shape[dim] == shards.total(streams):
                arguments[name] = shards.cut(self._image_first(x) if begins else x, Tokens(streams, dim))
            elif x is not None and self._plan.whole and "text" in streams and not shards.window.text:
                arguments[name] = shards.without_text(x, streams, dim)
        for name, tokens in self._plan.per_token.items():
            value = arguments.get(name)
            if value is not None:
                key = (name, blocks, id(value))
                if key not in self._cuts:
                    self._cuts[key] = value, self._cut(value, tokens, blocks, name in self._plan.spread)
                arguments[name] = self._cuts[key][1]
        for name, stream in self._plan.leading.items():
            if arguments.get(name) is not None:
                arguments[name] = shards.leading(arguments[name], stream)
        if self._plan.segments and not shards.is_whole:
            self._mask_segments(*self._plan.segments, arguments)
        if self._plan.length_base:
            self._rebase(*self._plan.length_base, arguments)
        if self._plan.rows:
            arguments[self._plan.rows] = shards.sizes["image"][shards.rank] // self._unit

    def _mask_segments(self, segments: str, valid: str, mask: str, arguments: Arguments) -> None:
        """Replace the segments by one mask, so that blocks attend to the whole sequence at once."""
        given, tokens = arguments.get(segments), self._call.tokens.image
        if given is None:
            return
        key, device = (segments, "", id(given)), arguments[self._plan.image].device
        if key not in self._cuts:
            self._cuts[key] = given, segment_mask(given, tokens, arguments.get(valid), device)
        arguments |= {segments: None, valid: None, mask: self._cuts[key][1]}

    def _rebase(self, argument: str, key: str, arguments: Arguments) -> None:
        """Change the base so that log(own tokens) / log(new base) is log(all tokens) / log(given base)."""
        given, shards = arguments.get(argument) or {}, self._call.tokens
        if given.get(key) and not shards.is_whole:
            own, total = (math.log(count) for count in (shards.sizes["image"][shards.rank], shards.image))
            arguments[argument] = given | {key: given[key] ** (own / total)}

    def _cut(self, value: Any, tokens: Tokens | tuple[Tokens | None, ...] | None, blocks: str, spread: bool) -> Any:
        if tokens is None or (isinstance(tokens, Tokens) and tokens.within not in (None, blocks)):
            return value
        if not isinstance(tokens, Tokens):
            return tuple(self._cut(x, one, blocks, spread) for x, one in zip(value, tokens, strict=True))

        def cut(x: Tensor) -> Tensor:
            own = self._call.tokens.cut(self._image_first(x), tokens)
            self._early |= spread and own is not x
            return own

        return cut(value) if isinstance(value, Tensor) else tree_map_only(Tensor, cut, value)

    def _share(self, blocks: str, arguments: Arguments) -> TokenShares:
        """The token shares of the forward whose first block runs next."""
        plan, stage = self._plan, self._stage
        count, text = arguments[plan.image].shape[plan.carrier_dim], 0
        if plan.text and arguments.get(plan.text) is not None:
            text = arguments[plan.text].shape[plan.carrier_dim]
        elif plan.carriers(blocks)[plan.image] != ("image",):  # it also carries the text
            whole, count = count, self._image_tokens
            text = whole - count
        return self._share_of(count, text, stage.window(count) if stage else Window(range(count)))

    def _share_of(self, count: int, text: int | None, window: Window) -> TokenShares:
        rank, ranks = (self._group.rank_in_group, self._group.world_size) if self._splits(count) else (0, 1)
        whole = ranks > 1 and bool(text) and (self._alone or text < ranks)  # blocks may fail without text tokens
        kind = self._unit, whole, self._plan.needs_text, self._lines, self._plan.whole
        return TokenShares(rank, ranks, count, text, window, *kind)

    def _splits(self, tokens: int) -> bool:
        """Whether image tokens are split: fewer than ranks stay whole on every rank, as blocks may fail without any."""
        smallest = len(self._stage.patch_tokens(tokens)[-1]) if self._stage else tokens
        return smallest // self._unit >= self._group.world_size

    def _cut_residual(self, x: Tensor) -> Tensor:
        """This rank's rows of a ControlNet's residual: of all tokens or, under PipeFusion, of the sub-step's tokens."""
        if self._stage:
            shares = self._share_of(self._image_tokens, None, self._stage.window(self._image_tokens))
            return x.split(shares.sizes["image"], dim=1)[shares.rank]
        if not self._splits(x.shape[1]):
            return x
        return self._share_of(x.shape[1], None, Window(range(x.shape[1]))).cut(x, Tokens(("image",)))

    def _leave_block(self, outputs: list[Streams], output: Any) -> Any:
        """After a block that was given no text: add zeros in its place, as the forward expects the full length."""
        return self._call.tokens.with_text(output, outputs, self._plan.carrier_dim)

    def _leave_blocks(self, outputs: list[Streams], output: Any) -> Any:
        """After the last block: gather all tokens of its output, unless they are gathered after the head."""
        if self._call.tokens is None or not self._early:
            return output
        if isinstance(output, Tensor):
            return self._image_first(self._gather(output, outputs[0]), -1)
        parts = zip(output, outputs, strict=True)
        return tuple(x if x is None else self._gather(x, streams) for x, streams in parts)

    def _leave_head(self, output: Tensor) -> Tensor:
        """After the head: gather all tokens of the image, unless that is done already."""
        return output if self._call.tokens is None or self._early else self._gather(output, ("image",))

    def _image_first(self, x: Tensor, way: int = 1) -> Tensor:
        """Move the text tokens at the start of each entry of ``[B, S, ...]`` to its end; back if ``way`` is -1."""
        if self._starts is None:
            return x
        places = (torch.arange(x.shape[1], device=x.device) + way * self._starts) % x.shape[1]
        return x[torch.arange(x.shape[0], device=x.device)[:, None], places]

    def _gather(self, x: Tensor, streams: Streams) -> Tensor:
        """Gather ``[B, own tokens, D]`` to ``[B, tokens, D]``; zeros for tokens that are not computed here."""
        shares, dim = self._call.tokens, self._plan.carrier_dim
        if shares.is_whole:
            return x
        return self._gather_rows(x.transpose(1, dim).contiguous(), streams, shares).transpose(1, dim)

    def _gather_rows(self, x: Tensor, streams: Streams, shares: TokenShares) -> Tensor:
        rows = shares.rows(streams, x.shape[1])
        if self._stage and not self._stage.is_last:
            return x.new_zeros(x.shape[0], rows.total, x.shape[2])
        x = rows.given(x, 1, shares.rank)
        if shares.ranks > 1:
            x = self._group.all_gather(x, dim=1, sizes=rows.key_lengths)
        return rows.in_sequence(x)

    def _attends_again(self, attentions: dict[str, nn.Module]) -> dict[str, Callable[..., Tensor]]:
        adapted = [name for name, one in attentions.items() if hasattr(getattr(one, "processor", None), "to_k_ip")]
        layout = Attention(("image",), self._plan.prompted)
        return {name: partial(self._attend, name, layout=layout) for name in adapted} if self._plan.prompted else {}

    def _attend(
        self, name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None,
        layout: Attention | None = None,
    ) -> Tensor:  # fmt: skip
        shards, stage = self._call.tokens, self._stage
        if shards.is_whole and not stage:
            return self._local(q, k, v, mask, scale)
        number = self._attended[name] = self._attended.get(name, 0) + 1
        layout, rank, ranks = layout or self._attentions[name], shards.rank, shards.ranks
        place = (self, name, number)
        held = self._plan.whole and not shards.window.text  # all of the text is in the buffer
        text = (stage.buffer(place).total - shards.image,) if held else ()
        queries, keys = (shards.rows(streams, x.shape[2], *text) for streams, x in zip(layout, (q, k), strict=True))
        if layout.keys == (PICTURE,):
            return self._local(q, k, v, mask, scale)
        parts = self._parts if ranks > 1 else None
        if parts and PICTURE in layout.keys:
            return self._attend_beside(parts, name, q, k, v, scale)
        if mask is not None:
            mask = self._pair_masks.over_keys(self._call.index, mask[(None,) * (4 - mask.dim())], q, k)
        per_key = mask is not None and mask.shape[2:] == (1, k.shape[2])
        if per_key:
            mask = additive(mask, q.dtype)
        elif mask is not None:
            mask = self._over_pairs(mask, queries, keys, parts.keys(keys, rank) if parts else keys.order, q, k)
        if parts:
            with parts.reach(name, keys, rank, k, v, mask if per_key else None) as (k, v, seen):
                return self._local(q, k, v, seen if per_key else mask, scale)
        mask = keys.given(mask, 3, rank) if per_key else mask
        k, v = keys.given(k, 2, rank), keys.given(v, 2, rank)

        def renew(k: Tensor, v: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
            k, v, of_keys = stage.buffer(place).renew(k, v, mask if per_key else None, keys.order, keys.total)
            return k, v, of_keys if per_key else mask

        if ranks == 1:
            return self._local(q, *renew(k, v, mask), scale)
        key_mask, pair_mask = (mask, None) if per_key else (None, mask)
        return usp_attention(
            q, k, v, keys.key_lengths, self._group, query_lengths=queries.lengths, mask=key_mask, pair_mask=pair_mask,
            scale=scale, backend=self._backend, renew=renew if stage else None,
        )  # fmt: skip

    def _attend_beside(
        self, parts: DistriFusion | NaivePatches, name: str, q: Tensor, k: Tensor, v: Tensor, scale: float | None
    ) -> Tensor:
        """Attention to the image's tokens and to the keys after them, which every rank holds in full."""
        shards = self._call.tokens
        sizes = [shards.sizes["image"][shards.rank], k.shape[2] - shards.sizes["image"][shards.rank]]
        (k, own_k), (v, own_v) = k.split(sizes, dim=2), v.split(sizes, dim=2)
        with parts.reach(name, shards.rows(("image",), sizes[0]), shards.rank, k, v, None) as (k, v, _):
            return self._local(q, torch.cat([k, own_k], dim=2), torch.cat([v, own_v], dim=2), None, scale)

    def _over_pairs(
        self, mask: Tensor, queries: Rows, keys: Rows, order: list[tuple[int, int]], q: Tensor, k: Tensor
    ) -> Tensor:
        """Cut a mask over pairs to the queries of this rank's Ulysses group, and to the keys in the order it sees."""
        ranks = range(1) if self._call.tokens.ranks == 1 else self._group.ulysses_block
        if self._call.tokens.ranks > 1 and mask.shape[2:] == (queries.total, k.shape[2]):
            # The mask has all queries, but only this rank's keys.
            mask, order = self._group.all_gather(mask, dim=3, sizes=keys.key_lengths), [(0, keys.total)]
        return cut_pairs(mask, queries, ranks, keys, [(0, keys.total)] if self._stage else order, q.dtype)
