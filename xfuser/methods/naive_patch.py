"""Naive patches: each rank computes its part of the image independently. A baseline with visible seams."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from xfuser.call import CallState
from xfuser.methods.tokens import Rows


class NaivePatches:
    """Lets a rank's tokens attend only to each other and to all of the text.

    Args:
        scheme: ``"row"``: parts are consecutive rows of tokens; ``"col"``: columns; ``"alternate"``: rows in even
            steps, columns in odd ones. Rows of a video are its frames, and columns are parts of each frame.
    """

    alone = True

    def __init__(self, scheme: str) -> None:
        self._scheme = scheme

    def enter(self, call: CallState) -> None:
        """During the call, its step determines whether parts are rows or columns."""
        self._call = call

    @property
    def across(self) -> bool:
        """Whether this step's parts are columns."""
        return self._scheme == "col" or (self._scheme == "alternate" and self._call.step % 2 == 1)

    def lines(self, rows: int, columns: int) -> int:
        """Number of lines of tokens that are split over the ranks.

        Raises:
            ValueError: parts are columns, but the tokens have none.
        """
        if self.across and columns == 1:
            raise ValueError(f"split_scheme={self._scheme!r} requires latents with columns: use 'row' for packed ones")
        return rows if self.across else 1

    def keys(self, keys: Rows, rank: int) -> list[tuple[int, int]]:
        """Positions of this rank's tokens in the full sequence: they attend to no others."""
        return keys.places(rank)

    @contextmanager
    def reach(
        self, name: str, keys: Rows, rank: int, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Iterator[tuple]:
        """Yield keys, values and mask unchanged: nothing comes from other ranks."""
        yield key, value, mask
