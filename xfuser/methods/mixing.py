"""Modules of blocks that mix tokens without attention: they convolve rows, or sum over all tokens."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from xfuser.core.attention.operator import outside_of_graphs
from xfuser.core.distributed.utils import share
from xfuser.core.hooks import Arguments, Binder, by_name, replaced
from xfuser.methods.sharded import ShardedModel
from xfuser.models.plan import Streams, Tokens, matching
from xfuser.vae.bands import Bands, common
from xfuser.vae.parallelize import OnBands


class MixingModules(ShardedModel):
    """A model whose mixing modules see all tokens; under PipeFusion, other patches' tokens as last computed.

    Attributes:
        _stage: the stage of PipeFusion, or None.
        _alone: whether each rank sees only its own tokens.
        _attended: number of attention calls of each module in this forward.
    """

    _stage: Any
    _alone: bool
    _attended: dict[str, int]
    _gather: Callable[[Tensor, Streams], Tensor]

    def _on_rows(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """The forward of a module that convolves the grid, ``[B, C, rows, columns]``, and reads other ranks' rows."""
        original = module.forward

        @wraps(original)
        def forward(x: Tensor) -> Tensor:
            shares = self._call.tokens
            rows = [size // x.shape[3] for size in shares.sizes["image"]]
            if self._stage:
                total = shares.image // x.shape[3]
                first = shares.window.image.start // x.shape[3]
                x = self._group.all_gather(x.contiguous(), dim=2, sizes=rows) if shares.ranks > 1 else x
                whole = self._stage.buffer((self, module)).renew_rows(x, (first, sum(rows)), total)
                return _on_some_rows(module, original, whole, share(rows, shares.rank), first)
            if shares.ranks == 1 or self._alone:
                return original(x)
            with OnBands(Bands(-2, rows, x.shape[3], self._group.device_group), None):
                return original(x)

        return forward

    def _gathering(self) -> Iterator[AbstractContextManager[None]]:
        """The hooks into modules that read all tokens of the image or patch, and into modules between blocks."""
        on_some = self._on_patch if self._stage else self._on_all
        for pattern, names in self._plan.gathered.items():
            for module in map(self._model.get_submodule, matching(self._model, pattern)):
                if set(names) <= set(Binder(module.forward).names):
                    place = pattern.partition("*.")[2]  # its name within a block, if it is in one
                    yield replaced(module, "forward", outside_of_graphs(on_some(module.forward, names), place))
        for pattern, name in self._plan.between.items() if self._stage else ():
            for module in map(self._model.get_submodule, matching(self._model, pattern)):
                yield replaced(module, "forward", self._where_held(module.forward, name))

    def _where_held(self, original: Callable[..., Tensor], name: str) -> Callable[..., Tensor]:
        """The forward of a module between blocks; returns zeros on stages that do not hold the tokens there."""

        def forward(arguments: Arguments) -> Tensor:
            return original(**arguments) if self._stage.holds else torch.zeros_like(arguments[name])

        return by_name(original, forward)

    def _on_all(self, original: Callable[..., Tensor], names: tuple[str, ...]) -> Callable[..., Tensor]:
        """The forward of a module that reads all image tokens; its output is cut to this rank's tokens."""

        def forward(arguments: Arguments) -> Tensor:
            arguments |= {name: self._gather(arguments[name], ("image",)) for name in names}
            return self._call.tokens.cut(original(**arguments), Tokens(("image",)))

        return by_name(original, forward)

    def _on_patch(self, original: Callable[..., Tensor], names: tuple[str, ...]) -> Callable[..., Tensor]:
        """As :meth:`_on_all`, for the tokens and frames of the patch."""

        def forward(arguments: Arguments) -> Tensor:
            shares = self._call.tokens
            sizes, image = shares.sizes["image"], shares.window.image
            for name in names if shares.ranks > 1 else ():
                arguments[name] = self._group.all_gather(arguments[name].contiguous(), dim=1, sizes=sizes)
            for name in self._plan.framed:
                tokens = shares.image // arguments[name].shape[1]
                arguments[name] = arguments[name][:, image.start // tokens : -(-image.stop // tokens)]
            return original(**arguments).split(sizes, dim=1)[shares.rank]

        return by_name(original, forward)

    def _sum(self, state: Tensor) -> Tensor:
        return state if self._call.tokens.ranks == 1 or self._alone else self._group.all_reduce(state)

    def _state(self, name: str, state: Tensor, part: Callable[[int, int], Tensor]) -> Tensor:
        """The state of all tokens, from that of this rank's tokens; under PipeFusion, summed over patches as well."""
        if not self._stage:
            return self._sum(state)
        number = self._attended[name] = self._attended.get(name, 0) + 1
        own = share(self._call.tokens.sizes["image"], self._call.tokens.rank)
        parts = [state]
        if self._call.synchronous:
            patches = [common(own, tokens) for tokens in self._stage.patch_tokens(self._call.tokens.image)]
            parts = [part(x.start - own.start, len(x)) if x else torch.zeros_like(state) for x in patches]
        return self._stage.summed((self, name, number), self._sum(torch.stack(parts)))


def _on_some_rows(
    module: nn.Module, forward: Callable[[Tensor], Tensor], whole: Tensor, rows: range, first: int
) -> Tensor:
    """These rows, counted from ``first``, of the result of a convolution over the whole map."""
    reach = sum(one.kernel_size[0] // 2 for one in module.modules() if isinstance(one, nn.Conv2d))
    start = max(0, first + rows.start - reach)
    stop = min(whole.shape[2], first + rows.stop + reach)
    return forward(whole[:, :, start:stop]).narrow(2, first + rows.start - start, len(rows))
