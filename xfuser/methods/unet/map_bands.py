"""DistriFusion (arXiv 2402.19481) of a U-Net: what its functions read of other ranks' bands, and when."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from itertools import chain
from typing import Any, NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from xfuser.config.config import ASYNCHRONOUS
from xfuser.core.distributed.utils import share
from xfuser.core.hooks import replaced
from xfuser.methods.staleness import Staleness
from xfuser.vae.bands import Bands, Piece, common, join_moments
from xfuser.vae.operations import SDPA
from xfuser.vae.parallelize import OnBands


class MapBands(Bands):
    """Bands whose rows, moments, keys and values reach the other ranks at once or for the next step, as the mode says.

    A U-Net doubles the rows that it halved before, so the heights of maps on the way up are known from the way down.

    Args:
        sizes: rows of the first map that each rank holds.
        columns: columns of that map.
    """

    owner = "DistriFusion"
    advice = "Use CFG or data parallelism for this model"

    def __init__(self, sizes: list[int], columns: int, staleness: Staleness) -> None:
        super().__init__(-2, sizes, columns, staleness.group)
        self._staleness = staleness
        self._finer: list[list[int]] = []  # heights before each halving

    def now(self, sizes: list[int], x: Tensor) -> None:
        """Record the heights of all bands at an operation; a new height is half of the last one, rounded up."""
        before, rows = sum(self._sizes), sum(sizes)
        if rows not in (before, -(-before // 2)):
            advice = "Use an image whose latent rows can be halved more often"
            raise self.refusal(f"{before} rows have become {rows}, which is not half of them, rounded up. {advice}")
        if rows != before:
            self._finer.append(self._sizes)
        super().now(sizes, x)

    def doubled(self, x: Tensor) -> None:
        """Record the heights after the doubling that returned ``x``."""
        sizes, rows = self._finer.pop() if self._finer else [], x.shape[self.dim]
        if not sizes or rows != sizes[self.rank]:
            raise self.refusal(f"a map was resized to {rows} rows, which is not its height before a halving")
        super().now(sizes, x)

    def borrow(self, pieces: list[Piece], sizes: list[int], needs: list[range]) -> tuple[Tensor | None, Tensor | None]:
        """As in :class:`Bands`, but every rank receives all rows that any rank needs from another."""
        held = [share(sizes, rank) for rank in range(self.ranks)]
        lent = [
            sorted({row for other, need in enumerate(needs) if other != rank for row in common(held[rank], need)})
            for rank in range(self.ranks)
        ]
        if not any(lent):
            return None, None
        own = [self.cut(pieces, range(row, row + 1)) for row in lent[self.rank]]
        own = torch.cat(own or [pieces[0][1].narrow(self.dim, 0, 0)], dim=self.dim).movedim(self.dim, 0)
        need, mine, rows = needs[self.rank], held[self.rank], list(chain(*lent))
        above = [place for place, row in enumerate(rows) if row in need and row < mine.start]
        below = [place for place, row in enumerate(rows) if row in need and row >= mine.stop]
        with self._staleness.exchange("rows", own, [len(one) for one in lent]) as full:
            # Not by an index tensor, which would be copied from the host to the GPU.
            sides = [[full[place : place + 1] for place in side] for side in (above, below)]
            return tuple(torch.cat(side).movedim(0, self.dim) if side else None for side in sides)

    def joined(self, moments: Tensor, eps: float) -> Tensor:
        """As in :class:`Bands`, in the way that the mode defines; the variances include ``eps``."""
        mode, late = self._staleness.mode, not self._staleness.synchronous
        if late and mode in ("separate_gn", "no_sync"):
            return moments
        before, own = self._staleness.last("moments"), moments.unsqueeze(0)
        with self._staleness.exchange("moments", own, [1] * self.ranks, wait=mode == "sync_gn") as full:
            if not late or mode != ASYNCHRONOUS or before is None or before.shape != own.shape:
                return join_moments(full)
            stale = join_moments(torch.cat([full[: self.rank], before, full[self.rank + 1 :]]))
        return _corrected(stale, before[0], moments, eps)

    def reach(self, key: Tensor, value: Tensor) -> AbstractContextManager[tuple[Tensor, Tensor]]:
        """A context that yields the keys and values of all bands (``[B, H, S, D]``), given this band's."""
        (height, width), tokens = self.area, key.shape[2]
        if tokens != height * width:
            what = f"attention over {tokens} tokens of {height * width} pixels, as with GLIGEN,"
            raise self.refusal(f"{what} is not supported")
        sizes = [size * width for size in self.sizes(height, "attention")]
        return self._staleness.keys_and_values("keys and values", key, value, sizes)


def _corrected(stale: Tensor, before: Tensor, own: Tensor, eps: float) -> Tensor:
    """The full map's moments of the last step, corrected by the change of this band's moments since then.

    Where the corrected variance is negative, this band's variance is used.
    """
    squares = [_mean_and_square(one) for one in (stale, own, before)]
    mean, square = (full + fresh - old for full, fresh, old in zip(*squares, strict=True))
    variance, own_variance = square - mean.square(), own[1:].chunk(2)[1]
    return torch.cat([stale[:1], mean, torch.where(variance < eps, own_variance, variance)])


def _mean_and_square(moments: Tensor) -> tuple[Tensor, Tensor]:
    mean, variance = moments[1:].chunk(2)
    return mean, variance + mean.square()


class OnMaps(OnBands):
    """While active, a U-Net's functions that mix rows work on bands; hooks on attention modules handle attention."""

    def __init__(self, bands: MapBands) -> None:
        super().__init__(bands, None)
        self.bands = bands
        self._attending = False
        for function in (torch.matmul, Tensor.matmul, SDPA):
            self._handlers[function] = partial(self._refuse, function)
        self._handlers[F.interpolate] = self._interpolate

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self._attending:
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    def attending(self) -> AbstractContextManager[None]:
        """Within the context, functions run unchanged, to compute attention whose keys are all on this rank."""
        return replaced(self, "_attending", True)

    def _refuse(self, function: Any, *args: Any, **kwargs: Any) -> NoReturn:
        raise self.bands.refusal(f"{function.__name__} outside of attention modules is not supported")

    def _interpolate(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        result = F.interpolate(x, *args, **kwargs)
        self.bands.doubled(result)
        return result
