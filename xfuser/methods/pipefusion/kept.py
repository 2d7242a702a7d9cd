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

    def buffer(self, name: Hashable) -> KVBuffer:
        """The buffer of an attention, or of a convolution's map, of this name."""
        return self._buffers.setdefault((name, self._call.index), KVBuffer())

    def summed(self, name: Hashable, fresh: Tensor) -> Tensor:
        """The sum of all patches' states; ``fresh``, ``[patches, ...]``, has all of them, or only this sub-step's."""
        kept = self._states.setdefault((name, self._call.index), fresh)
        if not self._call.synchronous:
            kept[self._call.patch] = fresh[0]
        elif kept is not fresh:
            kept.copy_(fresh)
        return kept.sum(dim=0)
