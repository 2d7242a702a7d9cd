"""DistriFusion (arXiv 2402.19481) of a transformer: attention to the other ranks' keys and values of the last step."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch.distributed as dist
from torch import Tensor, nn

from xfuser.call import CallState
from xfuser.methods.staleness import Staleness
from xfuser.methods.tokens import Rows
from xfuser.methods.unet.map_bands import MapBands, OnMaps


class DistriFusion:
    """Lets a rank's tokens attend to its own fresh keys and values, and to the other ranks' stale ones.

    Args:
        group: the ranks that exchange keys and values; it must carry no other messages meanwhile.
        mode: one of ``MODES``.
    """

    alone = across = False

    def __init__(self, model: nn.Module, group: dist.ProcessGroup, mode: str) -> None:
        self._model, self._group, self._mode = model, group, mode

    def enter(self, call: CallState) -> None:
        """During the call, the forwards of each step store what the next step needs."""
        self._staleness = Staleness(self._group, self._mode, call)
        call.around(self._model, self._staleness.layer)
        call.at_schedule(self._staleness.restart)
        call.callback(self._staleness.restart)  # waits for the transfers in flight

    def lines(self, rows: int, columns: int) -> int:
        """Number of lines of tokens that are split over the ranks: one, as each rank's tokens are consecutive."""
        return 1

    def keys(self, keys: Rows, rank: int) -> list[tuple[int, int]]:
        """Positions in the full sequence of the keys that :meth:`reach` yields."""
        return keys.order

    def on_maps(self, sizes: list[int], columns: int) -> OnMaps:
        """The mode in which a U-Net works on bands of its maps; ``sizes`` are the bands' initial heights."""
        return OnMaps(MapBands(sizes, columns, self._staleness))

    @contextmanager
    def reach(
        self, name: str, keys: Rows, rank: int, key: Tensor, value: Tensor, mask: Tensor | None
    ) -> Iterator[tuple]:
        """Yield the keys, values and key mask to attend to, given this rank's (``[B, H, S_local, D]``)."""
        sizes, given = keys.key_lengths, (keys.given(key, 2, rank), keys.given(value, 2, rank))
        with ExitStack() as stack:
            k, v = stack.enter_context(self._staleness.keys_and_values(name, *given, sizes))
            if mask is not None:
                own = keys.given(mask, 3, rank).movedim(3, 0)
                mask = stack.enter_context(self._staleness.exchange(f"{name} mask", own, sizes)).movedim(0, 3)
            yield k, v, mask
