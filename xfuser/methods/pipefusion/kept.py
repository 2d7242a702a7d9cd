"""What a stage keeps of earlier sub-steps: keys and values, maps that blocks convolve, states of linear attention."""

from collections.abc import Hashable

from torch import Tensor

from xfuser.call import CallState
from xfuser.core.attention.kv_buffer import KVBuffer


class Kept:
    """Tensors of the whole image, of which each sub-step renews its patch; apart for each call of the transformer."""

    def __init__(self, call: CallState) -> None:
        self._call = call
        self.clear()

    def clear(self) -> None:
        """Drop all of it."""
        self._buffers: dict[tuple[Hashable, int], KVBuffer] = {}
        self._states: dict[tuple[Hashable, int], Tensor] = {}

    def _buffer(self, name: Hashable) -> KVBuffer:
        return self._buffers.setdefault((name, self._call.index), KVBuffer())

    def attended(
        self, name: Hashable, places: list[tuple], total: int, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Fresh keys, values and key mask of an attention in, those of the full sequence out.

        ``places``, (first row, number of rows), and ``total`` say where the fresh rows are, and in how many.
        """
        return self._buffer(name).renew(k, v, mask, places, total)

    def text(self, name: Hashable, image: int) -> int:
        """Text tokens of an attention's full sequence, which has so many of the image."""
        return self._buffer(name).total - image

    def rows(self, name: Hashable, x: Tensor, place: tuple[int, int], total: int) -> Tensor:
        """The fresh rows of a map ``[B, C, rows, columns]`` in, all of it out."""
        return self._buffer(name).renew_rows(x, place, total)

    def summed(self, name: Hashable, fresh: Tensor) -> Tensor:
        """The sum of all patches' states, ``[patches, ...]``; ``fresh`` has all of them, or this sub-step's alone."""
        kept = self._states.setdefault((name, self._call.index), fresh)
        if not self._call.synchronous:
            kept[self._call.patch] = fresh[0]
        elif kept is not fresh:
            kept.copy_(fresh)
        return kept.sum(dim=0)
