"""The rank grid: which ranks form a group for each kind of parallelism."""

import math

import torch

DEFAULT_ORDER = "tp-sp-pp-cfg-dp"


def split_sizes(total: int, parts: int) -> list[int]:
    """Sizes of ``parts`` consecutive shares of ``total`` items; they differ by at most one, larger ones first."""
    base, extra = divmod(total, parts)
    return [base + (i < extra) for i in range(parts)]


def share(sizes: list[int], index: int) -> range:
    """The items of share ``index`` among consecutive shares of these sizes."""
    start = sum(sizes[:index])
    return range(start, start + sizes[index])


class RankGenerator:
    """Computes all groups of a world from one grid of ranks.

    ``order`` names the dimensions from the innermost (neighbouring ranks) to the outermost; dimensions of size 1 may be
    left out. A group of a token such as ``"sp"`` holds the ranks that differ only in that dimension; tokens joined by
    ``-`` (``"tp-sp"``) vary together.

    ``fs``, the number of ranks that shard a model's weights, is a dimension if ``order`` names it. Otherwise its
    groups span the other dimensions: each holds ``fs`` consecutive ranks.

    Both positional forms in use are supported, ``(tp, sp, pp, cfg, dp, order)`` and
    ``(tp, sp, pp, cfg, dp, fs, order)``, each optionally followed by ``rank_offset``, the first rank.
    """

    def __init__(
        self,
        tp: int,
        sp: int,
        pp: int,
        cfg: int,
        dp: int,
        *rest: int | str,
        fs: int = 1,
        order: str = DEFAULT_ORDER,
        rank_offset: int = 0,
    ) -> None:
        if rest and not isinstance(rest[0], str):
            fs, *rest = rest
        order, rank_offset = (*rest, *(order, rank_offset)[len(rest) :])
        degrees = {"tp": tp, "sp": sp, "pp": pp, "cfg": cfg, "dp": dp}
        self.order = order.lower().split("-")
        if "fs" in self.order:
            degrees["fs"] = fs
        self.order += [token for token, degree in degrees.items() if degree == 1 and token not in self.order]
        if sorted(self.order) != sorted(degrees):
            raise ValueError(f"order {order!r} must name each of {degrees} once; those of size 1 may be left out")
        self.world_size = math.prod(degrees.values())
        if self.world_size % fs:
            raise ValueError(f"fs={fs} must divide the number of ranks, {self.world_size} of {degrees}")
        self._fs = fs
        outermost_first = [degrees[token] for token in reversed(self.order)]
        ranks = torch.arange(rank_offset, rank_offset + self.world_size, device="cpu")
        self._grid = ranks.reshape(outermost_first)

    def get_ranks(self, token: str) -> list[list[int]]:
        """The groups of ``token``, each a list of global ranks, in rank order."""
        if token == "fs" and "fs" not in self.order:
            return self._grid.reshape(-1, self._fs).tolist()
        axes = sorted(len(self.order) - 1 - self.order.index(name) for name in token.split("-"))
        rest = [axis for axis in range(len(self.order)) if axis not in axes]
        grid = self._grid.permute(*rest, *axes)
        return grid.reshape(-1, math.prod(grid.shape[len(rest) :])).tolist()


def split_sequence_group(ranks: list[int], ulysses: int) -> tuple[list[list[int]], list[list[int]]]:
    """A sequence group's Ulysses groups (neighbours) and ring groups (every ``ulysses``-th rank)."""
    ulysses_groups = [ranks[i : i + ulysses] for i in range(0, len(ranks), ulysses)]
    return ulysses_groups, [list(group) for group in zip(*ulysses_groups, strict=True)]
