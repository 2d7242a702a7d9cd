"""Feature maps that are computed lazily, a few rows at a time.

With ``chunk_rows``, convolutions, norms, activations and similar operations are only recorded. Rows of a map are then
computed directly from the rows of held maps, through all operations in between, so that intermediate maps never exist
in full. The cost is time: a norm computes its input twice, once for its moments. Two kinds of maps are held: sums of
two maps, which are the outputs of a VAE's blocks, and maps much smaller than those they are computed from. While the
rows of a new held map are computed, those of the old one are freed. Unsupported operations get the full band.
"""

import weakref
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import count
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from xfuser.core import device as devices
from xfuser.core.distributed.utils import share
from xfuser.vae.bands import Bands, Piece
from xfuser.vae.functions import SUMS


def same_rows(rows: range) -> range:
    """The input rows of a row-wise operation: the output rows."""
    return rows


@dataclass(eq=False)
class Map:
    """A feature map of which this rank has a band: its rows are held, or computed from rows of other maps."""

    sizes: list[int]  # number of rows of each rank's band
    like: Tensor  # shape and dtype of this rank's band, on the meta device
    device: torch.device  # where it is computed
    inputs: list["Map"] = field(default_factory=list)  # maps that it is computed from
    needs: Callable[[range], range] = same_rows  # from output rows to the rows needed of each input
    compute: Callable[[range, list[Tensor]], Tensor] | None = None  # computes rows from the needed rows of each input
    workspace: int = 0  # extra bytes needed to compute the band at once
    is_sum: bool = False  # sum of two maps
    pieces: list[Piece] | None = None  # rows that are held

    def hold(self, pieces: list[Piece]) -> None:
        """Hold these pieces as the map's rows, and drop its inputs, which are no longer needed."""
        self.pieces, self.inputs, self.compute = pieces, [], None

    def beneath(self, end: "Map | None" = None) -> list["Map"]:
        """This map and all maps it is computed from, consumers first; without ``end`` and what only ``end`` needs."""
        found: dict[Map, None] = {}

        def visit(one: Map) -> None:
            if one is not end and one not in found:
                for x in one.inputs:
                    visit(x)
                found[one] = None

        visit(self)
        return list(found)[::-1]

    def held(self) -> list["Map"]:
        """The maps of :meth:`beneath` whose rows are held."""
        return [x for x in self.beneath() if x.pieces is not None]

    def wanted(self, rows: range) -> dict["Map", range]:
        """The rows of this map and of the maps beneath from which ``rows`` are computed."""
        maps = self.beneath()
        wanted = {self: rows}
        for one in maps:
            for x in one.inputs:
                need = one.needs(wanted[one])
                before = wanted.get(x, need)
                wanted[x] = range(min(need.start, before.start), max(need.stop, before.stop))
        return {one: wanted[one] for one in maps}


class DeferredMap(Tensor):
    """A tensor that represents a :class:`Map` in the code of a VAE."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, deferral: "Deferral", map: Map) -> "DeferredMap":
        """A tensor with the map's shape and no storage."""
        return Tensor._make_wrapper_subclass(cls, map.like.shape, dtype=map.like.dtype, device=map.device)

    def __init__(self, deferral: "Deferral", map: Map) -> None:
        self._deferral, self.map = deferral, map

    def band(self) -> Tensor:
        """This rank's band, computed now."""
        band = self._deferral.band(self.map)
        if hasattr(self, "_row_padding"):
            band = band.view_as(band)
            band._row_padding = self._row_padding
        return band

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*computed(args), **computed(kwargs or {}))


def computed(values: Any) -> Any:
    """The same values, with deferred maps replaced by this rank's bands."""
    return tree_map(lambda x: x.band() if isinstance(x, DeferredMap) else x, values)


class Deferral:
    """The deferred maps of one forward of an encoder or decoder.

    Args:
        chunk_rows: number of rows to compute at a time; ``"auto"`` uses as many as need a quarter of the free memory.
    """

    def __init__(self, bands: Bands, chunk_rows: int | str) -> None:
        self._bands, self._chunk_rows = bands, chunk_rows
        self._numbers = count()
        self._handles = weakref.WeakValueDictionary[int, DeferredMap]()  # in creation order, the same on all ranks

    def defer(self, map: Map) -> DeferredMap:
        """A tensor that represents this map, which is computed when its rows are needed."""
        handle = DeferredMap(self, map)
        self._handles[next(self._numbers)] = handle
        return handle

    def settle(self) -> None:
        """Compute all deferred maps that the VAE's code still references."""
        for handle in list(self._handles.values()):
            handle.band()

    def map_of(self, x: Tensor, where: str) -> Map:
        """The map of a tensor, for an operation that mixes rows; sums beneath it are computed and held."""
        if not isinstance(x, DeferredMap):
            sizes = self._bands.sizes(x.shape[self._bands.dim], where)
            return Map(sizes, x.to("meta"), x.device, pieces=[self._bands.piece(x, sizes)])
        for one in reversed(x.map.beneath()):
            if one.is_sum and one.pieces is None:
                self._hold(one)
        return x.map

    def parts(self, map: Map) -> Iterator[Tensor]:
        """This rank's band, a few rows at a time; the map is held from now on if it is small."""
        own, *beneath = [x.like.numel() // x.sizes[self._bands.rank] * sum(x.sizes) for x in (map, *map.held())]
        if map.pieces is None and 2 * own <= sum(beneath):
            self._hold(map)
        for _, part in self._parts(map):
            yield part

    def pointwise(self, function: Any, args: Any, kwargs: dict[str, Any]) -> Tensor:
        """Apply a row-wise function to deferred maps and tensors without rows; with other tensors, to the bands."""
        values, spec = tree_flatten((args, kwargs))
        places = [place for place, x in enumerate(values) if isinstance(x, DeferredMap)]
        inputs = [values[place].map for place in places]
        others = [x for x in values if isinstance(x, Tensor) and not isinstance(x, DeferredMap)]
        sizes, dim = inputs[0].sizes, self._bands.dim
        alike = all(x.sizes == sizes and x.like.dim() == inputs[0].like.dim() for x in inputs)
        if not alike or not all(x.dim() < -dim or (x.shape[dim] == 1 and 1 not in sizes) for x in others):
            return function(*computed(args), **computed(kwargs))
        for place in places:
            values[place] = None  # a deferred map lives as long as the VAE's code references it

        def compute(_: range, parts: list[Tensor], device: str | None = None) -> Tensor:
            filled = [x.to(device) if device and isinstance(x, Tensor) else x for x in values]
            for place, part in zip(places, parts, strict=True):
                filled[place] = part
            args, kwargs = tree_unflatten(filled, spec)
            return function(*args, **kwargs)

        like = compute(range(0), [x.like for x in inputs], "meta")
        is_sum = function in SUMS and len(inputs) == 2
        return self.defer(Map(sizes, like, inputs[0].device, inputs, compute=compute, is_sum=is_sum))

    def upsampled(self, x: DeferredMap, *args: Any, **kwargs: Any) -> Tensor:
        """``interpolate`` with ``mode="nearest"``, which repeats each row."""
        map, factor = x.map, kwargs.get("scale_factor")
        if args or kwargs.get("size") is not None or factor not in (2, 4, 8):
            return F.interpolate(x.band(), *args, **kwargs)
        factor = int(factor)

        def compute(rows: range, parts: list[Tensor]) -> Tensor:
            return F.interpolate(parts[0], **kwargs).narrow(self._bands.dim, rows.start % factor, len(rows))

        def needs(rows: range) -> range:
            return range(rows.start // factor, -(-rows.stop // factor))

        like = F.interpolate(map.like, **kwargs)
        return self.defer(Map([size * factor for size in map.sizes], like, map.device, [map], needs, compute))

    def band(self, map: Map) -> Tensor:
        """This rank's band of a map, in one piece."""
        if map.pieces is None:
            result, start = None, self._own(map).start
            for rows, part in self._parts(map, last=True):
                if result is None:
                    result = part.new_empty(map.like.shape)
                result.narrow(self._bands.dim, rows.start - start, len(rows)).copy_(part)
            map.hold([(start, result)])
        elif len(map.pieces) > 1:
            map.hold([(map.pieces[0][0], self._bands.cut(map.pieces, self._own(map)))])
        return map.pieces[0][1]

    def _hold(self, map: Map) -> None:
        map.hold([(rows.start, part) for rows, part in self._parts(map, last=True)])

    def _own(self, map: Map) -> range:
        return share(map.sizes, self._bands.rank)

    def _parts(self, map: Map, last: bool = False) -> Iterator[tuple[range, Tensor]]:
        """Yield a band's rows in order; if this is the ``last`` use, free rows of maps beneath on the way."""
        own, held = self._own(map), map.held()
        wanted = [map.wanted(share(map.sizes, rank)) for rank in range(self._bands.ranks)]
        halos = {x: self._bands.halo(x.pieces, x.sizes, [each[x] for each in wanted]) for x in held}
        mentioned = {handle.map for handle in self._handles.values()} - {map}
        kept = {x for other in mentioned for x in other.beneath(end=map)}
        freed = [x for x in held if last and x is not map and x not in kept]
        chunk = self._chunk(map)
        for start in range(own.start, own.stop, chunk):
            rows = range(start, min(start + chunk, own.stop))
            yield rows, self._compute(map, rows, halos)
            if rows.stop < own.stop:
                below = map.wanted(range(rows.stop, own.stop))
                for x in freed:
                    x.pieces = [piece for piece in x.pieces if self._bands.stop(piece) > below[x].start]

    def _chunk(self, map: Map) -> int:
        if self._chunk_rows != "auto":
            return self._chunk_rows
        row = sum(x.like.nbytes + x.workspace for x in map.beneath() if x.pieces is None) / len(self._own(map))
        return max(1, int(devices.free_memory() // (4 * max(row, 1))))

    def _compute(self, map: Map, rows: range, halos: dict[Map, list[Piece]]) -> Tensor:
        wanted = map.wanted(rows)
        parts: dict[Map, Tensor] = {}
        uses = {one: sum(x is one for other in wanted for x in other.inputs) for one in wanted}
        for one in reversed(wanted):
            if one.pieces is not None:
                parts[one] = self._bands.cut([*one.pieces, *halos[one]], wanted[one])
                continue
            need = one.needs(wanted[one])
            taken = [parts[x].narrow(self._bands.dim, need.start - wanted[x].start, len(need)) for x in one.inputs]
            for x in one.inputs:
                uses[x] -= 1
                if not uses[x]:
                    del parts[x]
            parts[one] = one.compute(wanted[one], taken)
        return parts[map]
