"""Naive patches: each rank computes its part of the image as if it were all. The baseline that shows its seams."""

from collections.abc import Iterator
from contextlib import contextmanager

from torch import Tensor

from xfuser.call import CallState
from xfuser.methods.tokens import Rows


class NaivePatches:
    """What a rank's part of the tokens attends to: that part, and all of the text.

    Args:
        scheme: ``"row"``: parts are consecutive rows of tokens; ``"col"``: columns; ``"alternate"``: rows and columns
            in turns, step by step. Rows of a video are its frames, and columns are parts of each frame.
    """

    alone = True

    def __init__(self, scheme: str) -> None:
        self._scheme = scheme

    @contextmanager
    def enter(self, call: CallState) -> Iterator[None]:
        """Within the context, the call's step says whether parts are rows or columns."""
        self._call = call
        yield

    @property
    def across(self) -> bool:
        """Whether this step's parts are columns."""
        return self._scheme == "col" or (self._scheme == "alternate" and self._call.step % 2 == 1)

    def lines(self, rows: int, columns: int) -> int:
        """Lines of tokens of which each rank takes a part.

        Raises:
            ValueError: the tokens come without rows and columns.
        """
        if self.across and columns == 1:
            raise ValueError(f"split_scheme={self._scheme!r} requires latents with columns: use 'row' for packed ones")
        return rows if self.across else 1

    def keys(self, keys: Rows, rank: int) -> list[tuple[int, int]]:
        """The places of this rank's own tokens among the keys: it sees no other."""
        return keys.places(rank)

    @contextmanager
    def reach(
        self, name: str, keys: Rows, rank: int, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Iterator[tuple]:
        """Keys, values and mask as they are: nothing comes from other ranks."""
        yield key, value, mask
