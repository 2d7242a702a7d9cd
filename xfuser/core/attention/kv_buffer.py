"""Keys and values that outlive the forward which made them."""

from torch import Tensor


class KVBuffer:
    """Keys, values and key mask of a whole sequence, of which each forward renews some rows.

    The memory is allocated by the first forward and used by all later ones.
    """

    def __init__(self) -> None:
        self._whole: dict[str, Tensor] = {}

    @property
    def total(self) -> int:
        """Rows of the whole sequence."""
        return self._whole["k"].shape[2]

    def renew(
        self, k: Tensor, v: Tensor, mask: Tensor | None, places: list[tuple[int, int]], total: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write fresh rows to their places; returns keys, values and mask of all ``total`` rows.

        Args:
            k, v: ``[B, H, S, D]``, the rows of the places one after the other.
            mask: additive, ``[B|1, H|1, 1, S]``, or None.
            places: (first row, number of rows) in the whole sequence.
        """
        mask = None if mask is None else self._write("mask", mask, 3, places, total)
        return self._write("k", k, 2, places, total), self._write("v", v, 2, places, total), mask

    def renew_rows(self, x: Tensor, place: tuple[int, int], total: int) -> Tensor:
        """The same of a map, ``[B, C, rows, columns]``."""
        return self._write("map", x, 2, [place], total)

    def _write(self, name: str, x: Tensor, dim: int, places: list[tuple[int, int]], total: int) -> Tensor:
        if name not in self._whole:
            self._whole[name] = x.new_empty([*x.shape[:dim], total, *x.shape[dim + 1 :]])
        whole = self._whole[name]
        for (start, length), rows in zip(places, x.split([length for _, length in places], dim=dim), strict=True):
            whole.narrow(dim, start, length).copy_(rows)
        return whole
