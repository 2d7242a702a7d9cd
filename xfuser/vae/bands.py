"""Bands: the rows (or columns) of a feature map that each rank holds, and their exchange between ranks."""

import torch
import torch.distributed as dist
from torch import Tensor

from xfuser.core.distributed.group_coordinator import all_gather_parts
from xfuser.core.distributed.utils import share

Piece = tuple[int, Tensor]  # the number of the first row, counted from the top of the full map, and the rows


class Bands:
    """The heights of all ranks' bands during one forward of an encoder or decoder.

    Every rank runs the same operations, so each knows the others' heights without communication. Where columns are
    divided, "rows" and "heights" mean columns and widths.

    Args:
        dim: the divided dimension of ``[..., H, W]``, -2 or -1.
        sizes: rows of the input that each rank of ``group`` holds, each 1 or more.
        across: length of the input's other dimension.
    """

    owner = "parallel VAE"  # the subject of an error, and its advice
    advice = "Run this VAE without use_parallel_vae"

    def __init__(self, dim: int, sizes: list[int], across: int, group: dist.ProcessGroup) -> None:
        self.dim, self.group, self.rank, self.ranks = dim, group, dist.get_rank(group), len(sizes)
        self._sizes = sizes
        self.area = (sizes[self.rank], across)  # of this rank's band after the last convolution
        self.frames: int | None = None  # number of frames after it, for videos

    def refusal(self, problem: str) -> ValueError:
        """An error that names the owner, the problem and the change to make."""
        return ValueError(f"{self.owner}: {problem}. {self.advice}")

    def sizes(self, height: int, where: str) -> list[int]:
        """The heights of all bands, given this rank's: as after the last operation, or all scaled by one factor."""
        before = self._sizes[self.rank]
        if height != before:
            by_a_factor = height and (height % before == 0 or before % height == 0)
            if not by_a_factor or any(size * height % before for size in self._sizes):
                raise self.refusal(f"{where} has {height} rows where this rank holds {before}, which is not supported")
            self._sizes = [size * height // before for size in self._sizes]
        return self._sizes

    def now(self, sizes: list[int], x: Tensor) -> None:
        """Set the heights after an operation that may have changed them; ``x`` is its result on this rank."""
        self._sizes = sizes
        self.area = (sizes[self.rank], x.shape[-3 - self.dim])
        self.frames = x.shape[2] if x.dim() == 5 else None

    def holds_map(self, x: Tensor) -> bool:
        """Whether the last two dimensions are those of a feature map, at the current scale or another."""
        return x.dim() >= 3 and self._has_area(x.shape)

    def _has_area(self, size: list[int]) -> bool:
        height, across = self.area
        return size[self.dim] * across == size[-3 - self.dim] * height

    def of_map(self, size: list[int], where: str) -> tuple[range | None, list[int]]:
        """This rank's rows of a map whose band has this size here, and the size of the full map.

        Returns None and the same size if it has no rows and columns.
        """
        if len(size) < 2:
            return None, size
        if not self._has_area(size):
            bands = "{} rows and {} columns, or multiples of these".format(*self.area)
            raise self.refusal(f"{where} of shape {tuple(size)} does not fit maps whose bands here have {bands}")
        sizes, full = self.sizes(size[self.dim], where), list(size)
        full[self.dim] = sum(sizes)
        return share(sizes, self.rank), full

    def rows_of(self, x: Tensor) -> int | None:
        """The dimension of the rows, also if channels are last or pixels are flattened; None if there are no rows."""
        height, width = self.area if self.dim == -2 else self.area[::-1]
        if x.dim() >= 4:
            ends = [end for end in (-1, -2) if x.shape[end - 1] * width == x.shape[end] * height]
            return x.dim() + ends[0] + 1 + self.dim if ends else None
        return next((dim for dim in range(1, x.dim()) if x.shape[dim] == height * width), None)

    def piece(self, x: Tensor, sizes: list[int]) -> Piece:
        """This rank's band as a piece, given the heights of all ranks' bands."""
        return share(sizes, self.rank).start, x

    def stop(self, piece: Piece) -> int:
        """The number of the row after a piece's last row."""
        return piece[0] + piece[1].shape[self.dim]

    def cut(self, pieces: list[Piece], rows: range) -> Tensor:
        """These rows, from pieces that together hold all of them."""
        parts = []
        for piece in sorted(pieces, key=lambda piece: piece[0]):
            if overlap := common(range(piece[0], self.stop(piece)), rows):
                parts.append(piece[1].narrow(self.dim, overlap.start - piece[0], len(overlap)))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self.dim)

    def halo(self, pieces: list[Piece], sizes: list[int], needs: list[range]) -> list[Piece]:
        """The rows that this rank needs from other ranks; ``needs`` has every rank's needs, ``pieces`` this band."""
        own, need = share(sizes, self.rank), needs[self.rank]
        above, below = self.borrow(pieces, sizes, needs)
        both = [(need.start, above), (max(own.stop, need.start), below)]
        return [(first, part) for first, part in both if part is not None]

    def borrow(self, pieces: list[Piece], sizes: list[int], needs: list[range]) -> tuple[Tensor | None, Tensor | None]:
        """As :meth:`halo`: the rows above and below this rank's band.

        Only needed rows are sent, including between ranks that are not neighbours.
        """
        held = [share(sizes, rank) for rank in range(self.ranks)]
        ranks = dist.get_process_group_ranks(self.group)
        ops, received = [], {}
        for other in range(self.ranks):
            if other == self.rank:
                continue
            if lent := common(held[self.rank], needs[other]):
                ops.append(dist.P2POp(dist.isend, self.cut(pieces, lent).contiguous(), ranks[other], self.group))
            if borrowed := common(held[other], needs[self.rank]):
                shape = list(pieces[0][1].shape)
                shape[self.dim] = len(borrowed)
                received[other] = pieces[0][1].new_empty(shape)
                ops.append(dist.P2POp(dist.irecv, received[other], ranks[other], self.group))
        for work in dist.batch_isend_irecv(ops) if ops else []:
            work.wait()  # on NCCL, only the compute stream waits, on which the rows are joined and convolved
        above = [x for rank, x in received.items() if rank < self.rank]
        below = [x for rank, x in received.items() if rank > self.rank]
        return tuple(torch.cat(parts, dim=self.dim) if parts else None for parts in (above, below))

    def gather(self, x: Tensor, sizes: list[int], dim: int) -> Tensor:
        """Concatenate all ranks' parts."""
        if self.ranks == 1:
            return x
        return torch.cat(all_gather_parts(x, dim % x.dim(), sizes, self.group), dim=dim)

    def joined(self, moments: Tensor, eps: float) -> Tensor:
        """Moments of the full map from those of this rank's band, in the format of :func:`join_moments`."""
        return join_moments(self.gather(moments.unsqueeze(0), [1] * self.ranks, 0))


def common(a: range, b: range) -> range:
    """The intersection of two ranges."""
    return range(max(a.start, b.start), max(a.start, b.start, min(a.stop, b.stop)))


def join_moments(moments: Tensor) -> Tensor:
    """Combine the moments of all parts, ``[parts, 1 + 2 n]`` to ``[1 + 2 n]``: pixel count, means, variances.

    All variances may include the same constant.
    """
    pixels = moments[:, :1]
    means, variances = moments[:, 1:].chunk(2, dim=1)
    weights = pixels / pixels.sum()
    mean = (means * weights).sum(0)
    variance = ((variances + (means - mean).square()) * weights).sum(0)
    return torch.cat([pixels.sum(0), mean, variance])
