"""Bands: which rows (or columns) of a feature map the ranks hold, and how they lend each other some."""

from collections.abc import Callable
from functools import partial

import torch
import torch.distributed as dist

from xfuser.core.distributed.group_coordinator import all_gather_parts
from xfuser.core.distributed.utils import share


class Bands:
    """The heights of all ranks' bands during one forward of an encoder or decoder.

    Every rank goes through the same operations, so each knows the others' heights without asking. Where bands are of
    columns, what is called rows and heights here are columns and widths.

    Args:
        dim: the dimension of ``[..., H, W]`` that is divided, -2 or -1.
        sizes: rows of the input that each rank of ``group`` holds, each 1 or more.
        across: length of the input's other dimension.
    """

    owner = "parallel VAE"  # what a refusal speaks of, and what it advises
    advice = "Run this VAE without use_parallel_vae"

    def __init__(self, dim: int, sizes: list[int], across: int, group: dist.ProcessGroup) -> None:
        self.dim, self.group, self.rank = dim, group, dist.get_rank(group)
        self._sizes = sizes
        self.area = (sizes[self.rank], across)  # of this rank's band, behind the last convolution
        self.frames: int | None = None  # there, if it was one of videos

    @property
    def ranks(self) -> int:
        return len(self._sizes)

    def sizes(self, height: int, where: str) -> list[int]:
        """The heights of all bands where this rank's is ``height``: as at the last operation, or all scaled alike.

        Raises:
            ValueError: no scale leads there.
        """
        before = self._sizes[self.rank]
        if height != before:
            up, down = height // before, before // height if height else 0
            if up > 1 and height == before * up:
                self._sizes = [size * up for size in self._sizes]
            elif down > 1 and before == height * down and not any(size % down for size in self._sizes):
                self._sizes = [size // down for size in self._sizes]
            else:
                raise ValueError(
                    f"{self.owner}: {where} was given {height} rows where this rank holds {before}: an operation"
                    f" ahead of it changed the rows in a way that is not supported. {self.advice}"
                )
        return self._sizes

    def now(self, sizes: list[int], x: torch.Tensor) -> None:
        """Note the heights behind an operation that may have changed them, with its result here."""
        self._sizes = sizes
        self.area = (sizes[self.rank], x.shape[-3 - self.dim])
        self.frames = x.shape[2] if x.dim() == 5 else None

    def holds_map(self, x: torch.Tensor) -> bool:
        """Whether the last two dimensions are those of a feature map: at the last one's scale, or another."""
        height, across = self.area
        return x.dim() >= 3 and x.shape[self.dim] * across == x.shape[-3 - self.dim] * height

    def of_map(self, size: list[int], where: str) -> tuple[range | None, list[int]]:
        """This rank's rows of a map whose part here has this size, and the size of the whole map.

        None, and the same size, where it has no rows and columns.

        Raises:
            ValueError: it has, but not those of a map.
        """
        if len(size) < 2:
            return None, size
        height, across = self.area
        if size[self.dim] * across != size[-3 - self.dim] * height:
            raise ValueError(
                f"{self.owner}: {where} of shape {tuple(size)} is not of maps whose bands here have {height} rows and"
                f" {across} columns, or multiples of these. {self.advice}"
            )
        sizes, whole = self.sizes(size[self.dim], where), list(size)
        whole[self.dim] = sum(sizes)
        return share(sizes, self.rank), whole

    def rows_of(self, x: torch.Tensor) -> int | None:
        """The dimension that the rows are along: also where channels are last, or the pixels are one dimension."""
        height, width = self.area if self.dim == -2 else self.area[::-1]
        if x.dim() >= 4:
            ends = [end for end in (-1, -2) if x.shape[end - 1] * width == x.shape[end] * height]
            return x.dim() + ends[0] + 1 + self.dim if ends else None
        return next((dim for dim in range(1, x.dim()) if x.shape[dim] == height * width), None)

    def with_halo(self, x: torch.Tensor, sizes: list[int], needs: list[range]) -> torch.Tensor:
        """What this rank needs: its own band's part of that between rows of others."""
        mine = common(share(sizes, self.rank), needs[self.rank])
        own_rows = partial(self._rows, x, share(sizes, self.rank))
        above, below = self.borrow(own_rows, x, sizes, needs)
        own = [own_rows(mine)] if mine else []
        parts = [part for part in (above, *own, below) if part is not None]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.dim)

    def borrow(
        self, own_rows: Callable[[range], torch.Tensor], like: torch.Tensor, sizes: list[int], needs: list[range]
    ) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The rows of others that this rank needs, above and below its own; ``needs`` are those that each rank needs.

        Rows of the whole map count from 0. Only rows that are needed travel, also from ranks that are no neighbours.

        Args:
            own_rows: gives rows of this rank's band.
            like: a part of the map.
        """
        held = [share(sizes, rank) for rank in range(len(sizes))]
        ranks = dist.get_process_group_ranks(self.group)
        ops, received = [], {}
        for other in range(len(sizes)):
            if other == self.rank:
                continue
            lent, borrowed = common(held[self.rank], needs[other]), common(held[other], needs[self.rank])
            if lent:
                rows = own_rows(lent).contiguous()
                ops.append(dist.P2POp(dist.isend, rows, ranks[other], self.group))
            if borrowed:
                shape = list(like.shape)
                shape[self.dim] = len(borrowed)
                received[other] = like.new_empty(shape)
                ops.append(dist.P2POp(dist.irecv, received[other], ranks[other], self.group))
        for work in dist.batch_isend_irecv(ops) if ops else []:
            work.wait()
        above = [received[rank] for rank in sorted(received) if rank < self.rank]
        below = [received[rank] for rank in sorted(received) if rank > self.rank]
        return tuple(torch.cat(parts, dim=self.dim) if parts else None for parts in (above, below))

    def gather(self, x: torch.Tensor, sizes: list[int], dim: int) -> torch.Tensor:
        """All ranks' parts, one after the other."""
        if self.ranks == 1:
            return x
        return torch.cat(all_gather_parts(x, dim % x.dim(), sizes, self.group), dim=dim)

    def joined(self, moments: torch.Tensor, eps: float) -> torch.Tensor:
        """Moments of the whole map from those of this rank's band, as :func:`join_moments` has them."""
        return join_moments(self.gather(moments.unsqueeze(0), [1] * self.ranks, 0))

    def _rows(self, x: torch.Tensor, held: range, rows: range) -> torch.Tensor:
        return x.narrow(self.dim, rows.start - held.start, len(rows))


def common(a: range, b: range) -> range:
    return range(max(a.start, b.start), max(a.start, b.start, min(a.stop, b.stop)))


def join_moments(moments: torch.Tensor) -> torch.Tensor:
    """The moments of all parts together, ``[1 + 2 n]`` from ``[parts, 1 + 2 n]``: pixels, means, variances, with
    the same constant in each."""
    pixels = moments[:, :1]
    means, variances = moments[:, 1:].chunk(2, dim=1)
    shares = pixels / pixels.sum()
    mean = (means * shares).sum(0)
    variance = ((variances + (means - mean).square()) * shares).sum(0)
    return torch.cat([pixels.sum(0), mean, variance])
