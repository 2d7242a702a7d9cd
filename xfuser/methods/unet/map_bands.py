"""DistriFusion (arXiv 2402.19481) of a U-Net: what its functions see of the others' bands of rows, and when."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.nn.functional as F

from xfuser.config.config import ASYNCHRONOUS
from xfuser.core.distributed.utils import share
from xfuser.methods.staleness import Staleness
from xfuser.vae.bands import Bands, common, join_moments
from xfuser.vae.operations import SDPA
from xfuser.vae.parallelize import OnBands


class MapBands(Bands):
    """Bands whose rows, moments, keys and values reach the other ranks as the mode says: at once, or for the next step.

    A U-Net doubles the rows that it has halved: what heights its maps come to on the way up is known from the way down.

    Args:
        sizes: rows of the first maps that each rank holds.
        columns: of these maps.
    """

    owner = "DistriFusion"
    advice = "Use CFG or data parallelism for this model"

    def __init__(self, sizes: list[int], columns: int, staleness: Staleness) -> None:
        super().__init__(-2, sizes, columns, staleness.group)
        self._staleness = staleness
        self._finer: list[list[int]] = []  # heights from before each halving

    def now(self, sizes: list[int], x: torch.Tensor) -> None:
        if sum(sizes) != sum(self._sizes):
            if sum(sizes) != -(-sum(self._sizes) // 2):
                raise ValueError(
                    f"{self.owner}: {sum(self._sizes)} rows have become {sum(sizes)}, which is not half of them,"
                    f" rounded up. Draw a picture whose rows of latents can be halved more often. {self.advice}"
                )
            self._finer.append(self._sizes)
        super().now(sizes, x)

    def doubled(self, x: torch.Tensor) -> None:
        """Note the heights behind the doubling that ``x`` has come from."""
        sizes = self._finer.pop() if self._finer else []
        if not sizes or x.shape[self.dim] != sizes[self.rank]:
            raise ValueError(
                f"{self.owner}: a map was resized to {x.shape[self.dim]} rows, and not to those from before a halving."
                f" {self.advice}"
            )
        super().now(sizes, x)

    def borrow(
        self, own_rows: Callable[[range], torch.Tensor], like: torch.Tensor, sizes: list[int], needs: list[range]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """As in :class:`Bands`; every rank gets the rows that any other one needs."""
        held = [share(sizes, rank) for rank in range(self.ranks)]
        lent = [
            sorted({row for other, need in enumerate(needs) if other != rank for row in common(held[rank], need)})
            for rank in range(self.ranks)
        ]
        if not any(lent):
            return None, None
        own = [own_rows(range(row, row + 1)) for row in lent[self.rank]] or [like.narrow(self.dim, 0, 0)]
        own = torch.cat(own, dim=self.dim).movedim(self.dim, 0)
        with self._staleness.exchange("rows", own, [len(rows) for rows in lent]) as whole:
            need, mine = needs[self.rank], held[self.rank]
            places = {row: at for at, row in enumerate(chain(*lent)) if row in need and row not in mine}
            sides = [[places[row] for row in places if (row < mine.start) == above] for above in (True, False)]
            above, below = (whole[side].movedim(0, self.dim) if side else None for side in sides)
        return above, below

    def joined(self, moments: torch.Tensor, eps: float) -> torch.Tensor:
        """As in :class:`Bands`, by the mode's definition; ``eps`` is a part of the variances."""
        mode, late = self._staleness.mode, not self._staleness.synchronous
        if late and mode in ("separate_gn", "no_sync"):
            return moments
        before, own = self._staleness.last("moments"), moments.unsqueeze(0)
        with self._staleness.exchange("moments", own, [1] * self.ranks, wait=mode == "sync_gn") as whole:
            if not late or mode != ASYNCHRONOUS or before is None or before.shape != own.shape:
                return join_moments(whole)
            stale = torch.cat([whole[: self.rank], before, whole[self.rank + 1 :]])
        return _corrected(join_moments(stale), before[0], moments, eps)

    @contextmanager
    def reach(self, key: torch.Tensor, value: torch.Tensor) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Within the context, keys and values of all bands (``[B, H, S, D]``), from this one's."""
        height, width = self.area
        if key.shape[2] != height * width:
            raise ValueError(
                f"{self.owner}: self-attention over {key.shape[2]} tokens of {height * width} pixels, as with GLIGEN,"
                f" is not supported. {self.advice}"
            )
        sizes = [size * width for size in self.sizes(height, "attention")]
        with self._staleness.keys_and_values("keys and values", key, value, sizes) as both:
            yield both


def _corrected(stale: torch.Tensor, before: torch.Tensor, own: torch.Tensor, eps: float) -> torch.Tensor:
    """Moments of the whole map one step ago, moved by as much as this band's have since.

    Where that leaves a variance below zero, it is this band's.
    """
    squares = [_mean_and_square(one) for one in (stale, own, before)]
    mean, square = (whole + fresh - old for whole, fresh, old in zip(*squares, strict=True))
    variance, own_variance = square - mean.square(), own[1:].chunk(2)[1]
    return torch.cat([stale[:1], mean, torch.where(variance < eps, own_variance, variance)])


def _mean_and_square(moments: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    mean, variance = moments[1:].chunk(2)
    return mean, variance + mean.square()


class OnMaps(OnBands):
    """While active, a U-Net's functions that mix rows work on bands; attention is left to hooks on its modules."""

    def __init__(self, bands: MapBands) -> None:
        super().__init__(bands, None)
        self.bands = bands
        self._attending = False
        for function in (torch.matmul, torch.Tensor.matmul, SDPA):
            self._handlers[function] = partial(self._refuse, function)
        self._handlers[F.interpolate] = self._interpolate

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if self._attending:
            return func(*args, **(kwargs or {}))
        return super().__torch_function__(func, types, args, kwargs)

    @contextmanager
    def attending(self) -> Iterator[None]:
        """Within the context, functions are what they are: it computes attention whose keys are all there."""
        self._attending = True
        try:
            yield
        finally:
            self._attending = False

    def _refuse(self, function: Any, *args: Any, **kwargs: Any) -> None:
        raise ValueError(
            f"{self.bands.owner}: {function.__name__} outside of attention modules is not supported."
            f" {self.bands.advice}"
        )

    def _interpolate(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        result = F.interpolate(x, *args, **kwargs)
        self.bands.doubled(result)
        return result
