"""DistriFusion (arXiv 2402.19481) of a transformer: attention to the keys and values that others had one step ago."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from torch import nn

from xfuser.call import CallState
from xfuser.methods.staleness import Staleness
from xfuser.methods.tokens import Rows
from xfuser.methods.unet.map_bands import MapBands, OnMaps

KeysValues = tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]


class DistriFusion:
    """What attention of a rank's part of the tokens sees: own keys and values, and what the others' last were.

    Args:
        group: the ranks, which exchange keys and values; nothing else may travel on it meanwhile.
        mode: one of ``MODES``.
    """

    alone = across = False

    def __init__(self, model: nn.Module, group: dist.ProcessGroup, mode: str) -> None:
        self._model, self._group, self._mode = model, group, mode

    @contextmanager
    def enter(self, call: CallState) -> Iterator[None]:
        """Within the context, what the call's forwards leave is kept for the next step."""
        self._staleness = staleness = Staleness(self._group, self._mode, call)
        call.around(self._model, staleness.layer)
        call.at_schedule(staleness.restart)
        try:
            yield
        finally:
            staleness.restart()  # nothing on its way is left to the next call

    def lines(self, rows: int, columns: int) -> int:
        """Lines of tokens of which each rank takes a part: one, as shares are consecutive."""
        return 1

    def keys(self, keys: Rows, rank: int) -> list[tuple[int, int]]:
        """Where the keys lie in the whole sequence that :meth:`reach` gives."""
        return keys.order

    def on_maps(self, sizes: list[int], columns: int) -> OnMaps:
        """The mode in which a U-Net works on bands of its maps, of these heights at first."""
        return OnMaps(MapBands(sizes, columns, self._staleness))

    @contextmanager
    def reach(
        self, name: str, keys: Rows, rank: int, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None
    ) -> Iterator[KeysValues]:
        """Keys, values and key mask to attend to within the context, of this rank's (``[B, H, S_local, D]``)."""
        sizes = keys.key_lengths
        key, value = keys.given(key, 2, rank), keys.given(value, 2, rank)
        with self._staleness.keys_and_values(name, key, value, sizes) as (k, v):
            if mask is None:
                yield k, v, None
                return
            with self._staleness.exchange(f"{name} mask", keys.given(mask, 3, rank).movedim(3, 0), sizes) as masks:
                yield k, v, masks.movedim(0, 3)
