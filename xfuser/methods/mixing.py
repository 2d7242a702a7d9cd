"""Modules of blocks that mix tokens by other means than attention: they convolve rows, or sum over all tokens."""

from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn

from xfuser.core.distributed.utils import share
from xfuser.methods.sharded import ShardedModel
from xfuser.vae.bands import Bands, common
from xfuser.vae.parallelize import OnBands


class MixingModules(ShardedModel):
    """A model whose modules of that kind see all tokens; under PipeFusion, other patches' as they were last computed.

    Attributes:
        _stage: of PipeFusion, or None.
        _alone: whether ranks see their own tokens only.
        _attended: how often each module was asked to attend in this forward.
    """

    _stage: Any
    _alone: bool
    _attended: dict[str, int]

    def _on_rows(self, module: nn.Module) -> Callable[[Tensor], Tensor]:
        """The forward of a module that convolves the grid, ``[B, C, rows, columns]``, and looks into others' rows."""
        original = module.forward

        @wraps(original)
        def forward(x: Tensor) -> Tensor:
            shares = self._call.tokens
            rows = [size // x.shape[3] for size in shares.sizes["image"]]
            if self._stage:
                total = shares.totals["image"] // x.shape[3]
                first = shares.window.image.start // x.shape[3]
                x = self._group.all_gather(x.contiguous(), dim=2, sizes=rows) if shares.ranks > 1 else x
                whole = self._stage.kept.rows((self, module), x, (first, sum(rows)), total)
                return _on_some_rows(module, original, whole, share(rows, shares.rank), first)
            if shares.ranks == 1 or self._alone:
                return original(x)
            with OnBands(Bands(-2, rows, x.shape[3], self._group.device_group), None):
                return original(x)

        return forward

    def _sum(self, state: Tensor) -> Tensor:
        return state if self._call.tokens.ranks == 1 or self._alone else self._group.all_reduce(state)

    def _state(self, name: str, state: Tensor, part: Callable[[int, int], Tensor]) -> Tensor:
        """The state of all tokens from that of this rank's; under PipeFusion the sum of those of the patches."""
        if not self._stage:
            return self._sum(state)
        number = self._attended[name] = self._attended.get(name, 0) + 1
        own = share(self._call.tokens.sizes["image"], self._call.tokens.rank)
        parts = [state]
        if self._call.synchronous:
            patches = [common(own, tokens) for tokens in self._stage.patch_tokens(self._call.tokens.totals["image"])]
            parts = [part(x.start - own.start, len(x)) if x else torch.zeros_like(state) for x in patches]
        return self._stage.kept.summed((self, name, number), self._sum(torch.stack(parts)))


def _on_some_rows(
    module: nn.Module, forward: Callable[[Tensor], Tensor], whole: Tensor, rows: range, first: int
) -> Tensor:
    """Of a convolution's result on a map, these rows, counted from the ``first`` one."""
    reach = sum(one.kernel_size[0] // 2 for one in module.modules() if isinstance(one, nn.Conv2d))
    start = max(0, first + rows.start - reach)
    stop = min(whole.shape[2], first + rows.stop + reach)
    return forward(whole[:, :, start:stop]).narrow(2, first + rows.start - start, len(rows))
