"""Keys and values that outlive the forward that computed them."""

from torch import Tensor


class KVBuffer:
    """Keys, values and key mask of a whole sequence; each forward updates some of its tokens.

    The first forward allocates the memory, and all later ones reuse it.
    """

    def __init__(self) -> None:
        self._whole: dict[str, Tensor] = {}

    @property
    def total(self) -> int:
        """Number of tokens of the whole sequence."""
        return self._whole["k"].shape[2]

    def renew(
        self, k: Tensor, v: Tensor, mask: Tensor | None, places: list[tuple[int, int]], total: int
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Write fresh tokens to their places; return keys, values and mask of all ``total`` tokens.

        Args:
            k, v: ``[B, H, S, D]``, the tokens of all places, concatenated.
            mask: additive, ``[B|1, H|1, 1, S]``, or None.
            places: (first token, number of tokens) in the whole sequence.
        """
        mask = None if mask is None else self._write("mask", mask, 3, places, total)
        return self._write("k", k, 2, places, total), self._write("v", v, 2, places, total), mask

    def renew_rows(self, x: Tensor, place: tuple[int, int], total: int) -> Tensor:
        """The same for the rows of a feature map, ``[B, C, rows, columns]``."""
        return self._write("map", x, 2, [place], total)

    def _write(self, name: str, x: Tensor, dim: int, places: list[tuple[int, int]], total: int) -> Tensor:
        if name not in self._whole:
            self._whole[name] = x.new_empty([*x.shape[:dim], total, *x.shape[dim + 1 :]])
        whole = self._whole[name]
        for (start, length), rows in zip(places, x.split([length for _, length in places], dim=dim), strict=True):
            whole.narrow(dim, start, length).copy_(rows)
        return whole
