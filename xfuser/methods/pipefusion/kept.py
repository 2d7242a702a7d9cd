"""State that a stage keeps between sub-steps: keys and values, maps for convolutions, states of linear attention."""

from collections.abc import Hashable

from torch import Tensor

from xfuser.call import CallState
from xfuser.core.attention.kv_buffer import KVBuffer


class Kept:
    """Tensors of the whole image, separate for each call of the transformer; each sub-step updates its patch."""

    def __init__(self, call: CallState) -> None:
        self._call = call
        self.clear()

    def clear(self) -> None:
        """Drop all tensors."""
        self._buffers: dict[tuple[Hashable, int], KVBuffer] = {}
        self._states: dict[tuple[Hashable, int], Tensor] = {}

    def _buffer(self, name: Hashable) -> KVBuffer:
        return self._buffers.setdefault((name, self._call.index), KVBuffer())

    def attended(
        self, name: Hashable, places: list[tuple], total: int, k: Tensor, v: Tensor, mask: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """Store fresh keys, values and key mask of an attention; return those of the full sequence.

        ``places`` are the positions of the fresh rows, (first row, number of rows), among ``total`` rows.
        """
        return self._buffer(name).renew(k, v, mask, places, total)

    def text(self, name: Hashable, image: int) -> int:
        """The number of text tokens in an attention's full sequence, which has ``image`` image tokens."""
        return self._buffer(name).total - image

    def rows(self, name: Hashable, x: Tensor, place: tuple[int, int], total: int) -> Tensor:
        """Store the fresh rows of a map ``[B, C, rows, columns]``; return the whole map."""
        return self._buffer(name).renew_rows(x, place, total)

    def summed(self, name: Hashable, fresh: Tensor) -> Tensor:
        """The sum of all patches' states; ``fresh``, ``[patches, ...]``, has all of them, or only this sub-step's."""
        kept = self._states.setdefault((name, self._call.index), fresh)
        if not self._call.synchronous:
            kept[self._call.patch] = fresh[0]
        elif kept is not fresh:
            kept.copy_(fresh)
        return kept.sum(dim=0)
