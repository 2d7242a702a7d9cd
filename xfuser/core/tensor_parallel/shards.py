"""Which entries of a dimension each rank keeps."""

from typing import NamedTuple

import torch
from torch import Tensor

from xfuser.core.distributed.utils import share, split_sizes


class Shards(NamedTuple):
    """A dimension that is divided over ranks.

    Attributes:
        kept: for each rank, the ranges of entries that it keeps, in order. Several ranks may keep the same entry.
        total: entries of the full dimension.
    """

    kept: tuple[tuple[range, ...], ...]
    total: int

    @property
    def sizes(self) -> list[int]:
        """Number of entries that each rank keeps."""
        return [sum(map(len, ranges)) for ranges in self.kept]

    def times(self, size: int) -> "Shards":
        """The same shards with each entry replaced by ``size`` entries, such as a head by its channels."""
        kept = (tuple(range(one.start * size, one.stop * size) for one in ranges) for ranges in self.kept)
        return Shards(tuple(kept), self.total * size)

    def part(self, full: Tensor, dim: int, rank: int) -> Tensor:
        """The part of a full tensor that ``rank`` keeps."""
        pieces = [full.narrow(dim, one.start, len(one)) for one in self.kept[rank]]
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)

    def full(self, parts: list[Tensor], dim: int) -> Tensor:
        """The full tensor, from the parts of all ranks."""
        shape = list(parts[0].shape)
        shape[dim] = self.total
        full = parts[0].new_empty(shape)
        for ranges, part in zip(self.kept, parts, strict=True):
            pieces = part.split([len(one) for one in ranges], dim)
            for one, piece in zip(ranges, pieces, strict=True):
                full.narrow(dim, one.start, len(one)).copy_(piece)
        return full


def evenly(total: int, ranks: int) -> Shards:
    """Shards whose sizes differ by at most one."""
    sizes = split_sizes(total, ranks)
    return Shards(tuple((share(sizes, rank),) for rank in range(ranks)), total)


def joined(*sections: Shards) -> Shards:
    """A dimension that concatenates ``sections``; each rank keeps its part of every section."""
    kept, start = [()] * len(sections[0].kept), 0
    for section in sections:
        for rank, ranges in enumerate(section.kept):
            kept[rank] += tuple(range(start + one.start, start + one.stop) for one in ranges)
        start += section.total
    return Shards(tuple(kept), start)
