"""Feature maps that are computed a few rows at a time, when something needs them.

With ``chunk_rows``, convolutions, norms, activations and the like only note what they would do. Rows of a map are then
computed straight from the rows of maps that are held, through all operations in between, so that these never exist
whole. A norm needs its input once more, for its moments: that is the price in time. Held are sums of two maps, which
are what the blocks of a VAE hand on, and maps that are much smaller than what they are computed from; as the rows of
a new one come into being, those of the old one go. Operations that are not supported get the whole map.
"""

import weakref
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.utils._pytree import tree_flatten, tree_map, tree_unflatten

from xfuser.core import device as devices
from xfuser.core.distributed.utils import share
from xfuser.vae.bands import Bands

SUMS = {torch.add, torch.Tensor.add, torch.Tensor.__add__, torch.Tensor.__radd__}
POINTWISE = SUMS | {
    F.gelu,
    F.hardswish,
    F.leaky_relu,
    F.relu,
    F.relu6,
    F.silu,
    torch.clamp,
    torch.div,
    torch.mul,
    torch.relu,
    torch.sigmoid,
    torch.sub,
    torch.tanh,
    torch.Tensor.__mul__,
    torch.Tensor.__rmul__,
    torch.Tensor.__sub__,
    torch.Tensor.__truediv__,
    torch.Tensor.clamp,
    torch.clone,
    torch.Tensor.contiguous,
    torch.Tensor.div,
    torch.Tensor.mul,
    torch.Tensor.sigmoid,
    torch.Tensor.sub,
    torch.Tensor.tanh,
}
ABOUT = {  # what tells of a tensor without its values
    torch.Tensor.device.__get__,
    torch.Tensor.dtype.__get__,
    torch.Tensor.is_cuda.__get__,
    torch.Tensor.ndim.__get__,
    torch.Tensor.requires_grad.__get__,
    torch.Tensor.shape.__get__,
    torch.Tensor.dim,
    torch.Tensor.element_size,
    torch.Tensor.is_floating_point,
    torch.Tensor.numel,
    torch.Tensor.size,
    torch.is_floating_point,
}


class Map:
    """A feature map, of which this rank has a band: rows are held, or computed from those of others.

    Rows count from 0 at the top of the whole map.

    Args:
        sizes: rows of each rank's band.
        like: tells the band's shape and type.
        device: where it is computed.
        inputs: the maps that it is computed from.
        needs: from rows to the rows of each input that they are computed from.
        compute: makes rows from those, ``compute(rows, parts)`` with a part of each input.
        workspace: bytes that computing the band at once takes besides its own.
        is_sum: it is a sum of two maps.
    """

    def __init__(
        self,
        sizes: list[int],
        like: torch.Tensor,
        device: torch.device,
        inputs: list["Map"],
        needs: Callable[[range], range],
        compute: Callable[[range, list[torch.Tensor]], torch.Tensor],
        workspace: int = 0,
        is_sum: bool = False,
    ) -> None:
        self.sizes, self.like, self.device = sizes, like.to("meta"), device
        self.inputs, self.needs, self.compute = inputs, needs, compute
        self.workspace, self.is_sum = like.nbytes + workspace, is_sum
        self.pieces: list[tuple[int, torch.Tensor]] | None = None  # what is held, each with its first row

    def hold(self, pieces: list[tuple[int, torch.Tensor]]) -> None:
        self.pieces, self.inputs, self.compute = pieces, [], _nothing

    def beneath(self, end: "Map | None" = None) -> list["Map"]:
        """This map and those that it is computed from, each behind all that need it; ``end`` ends it, left out."""
        found: dict[Map, None] = {}
        self._visit(found, end)
        return list(found)[::-1]

    def _visit(self, found: dict["Map", None], end: "Map | None") -> None:
        if self is not end and self not in found:
            for x in self.inputs:
                x._visit(found, end)
            found[self] = None

    def wanted(self, rows: range) -> dict["Map", range]:
        """The rows of this map and of those beneath that ``rows`` are computed from."""
        maps = self.beneath()
        wanted = {self: rows}
        for one in maps:
            for x in one.inputs:
                need = one.needs(wanted[one])
                before = wanted.get(x, need)
                wanted[x] = range(min(need.start, before.start), max(need.stop, before.stop))
        return {one: wanted[one] for one in maps}


def _nothing(rows: range, parts: list[torch.Tensor]) -> torch.Tensor:
    raise AssertionError("rows that were given up are needed")


class DeferredMap(torch.Tensor):
    """Stands for a :class:`Map` in the code of a VAE."""

    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, deferral: "Deferral", map: Map) -> "DeferredMap":
        return torch.Tensor._make_wrapper_subclass(cls, map.like.shape, dtype=map.like.dtype, device=map.device)

    def __init__(self, deferral: "Deferral", map: Map) -> None:
        self._deferral, self.map = deferral, map

    def band(self) -> torch.Tensor:
        """This rank's rows."""
        band = self._deferral.band(self.map)
        if hasattr(self, "_row_padding"):
            band = band.view_as(band)
            band._row_padding = self._row_padding
        return band

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        return func(*computed(args), **computed(kwargs or {}))


def computed(values: Any) -> Any:
    """The same values, with this rank's bands in the place of deferred maps."""
    return tree_map(lambda x: x.band() if isinstance(x, DeferredMap) else x, values)


class Deferral:
    """What is deferred during one forward of an encoder or decoder.

    Args:
        chunk_rows: rows that are computed at a time; ``"auto"``: as many as need a quarter of the free memory.
    """

    def __init__(self, bands: Bands, chunk_rows: int | str) -> None:
        self._bands, self._chunk_rows = bands, chunk_rows
        self._handles: list[weakref.ref[DeferredMap]] = []

    def defer(self, map: Map) -> DeferredMap:
        handle = DeferredMap(self, map)
        self._handles = [*(one for one in self._handles if one() is not None), weakref.ref(handle)]
        return handle

    def settle(self) -> None:
        """Compute all that the code of the VAE still has."""
        for handle in [one() for one in self._handles]:
            if handle is not None:
                handle.band()

    def map_of(self, x: torch.Tensor, where: str) -> Map:
        """The map behind a tensor, for an operation that mixes rows; sums beneath it are held from now on."""
        if isinstance(x, DeferredMap):
            for one in reversed(x.map.beneath()):
                if one.is_sum and one.pieces is None:
                    self._hold(one)
            return x.map
        sizes = self._bands.sizes(x.shape[self._bands.dim], where)
        held = Map(sizes, x, x.device, [], range, _nothing)
        held.hold([(self._own(held).start, x)])
        return held

    def parts(self, map: Map) -> Iterator[torch.Tensor]:
        """This rank's band, some rows at a time; held from now on, where that takes little."""
        counts = [x.like.numel() // x.sizes[self._bands.rank] * sum(x.sizes) for x in (map, *_held(map))]
        if map.pieces is None and 2 * counts[0] <= sum(counts[1:]):
            self._hold(map)
        for _, part in self._parts(map):
            yield part

    def pointwise(self, function: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        """A function that treats all rows alike, of deferred maps and what has no rows. With others: of the bands."""
        values, spec = tree_flatten((args, kwargs))
        places = [place for place, x in enumerate(values) if isinstance(x, DeferredMap)]
        inputs = [values[place].map for place in places]
        others = [x for x in values if isinstance(x, torch.Tensor) and not isinstance(x, DeferredMap)]
        sizes, dim = inputs[0].sizes, self._bands.dim
        alike = all(x.sizes == sizes and x.like.dim() == inputs[0].like.dim() for x in inputs)
        if not alike or not all(x.dim() < -dim or (x.shape[dim] == 1 and 1 not in sizes) for x in others):
            return function(*computed(args), **computed(kwargs))
        for place in places:
            values[place] = None  # a deferred map ends with the last mention of it in the VAE's code

        def apply(parts: list[torch.Tensor], move: Callable[[Any], Any] = lambda x: x) -> torch.Tensor:
            filled = [move(x) for x in values]
            for place, part in zip(places, parts, strict=True):
                filled[place] = part
            args, kwargs = tree_unflatten(filled, spec)
            return function(*args, **kwargs)

        example = apply([x.like for x in inputs], lambda x: x.to("meta") if isinstance(x, torch.Tensor) else x)
        is_sum = function in SUMS and len(inputs) == 2
        return self.defer(
            Map(sizes, example, inputs[0].device, inputs, same_rows, lambda _, parts: apply(parts), is_sum=is_sum)
        )

    def upsampled(self, x: DeferredMap, *args: Any, **kwargs: Any) -> torch.Tensor:
        """``interpolate`` with ``mode="nearest"``: each row some times over."""
        map, dim = x.map, self._bands.dim
        factor = kwargs.get("scale_factor")
        if args or kwargs.get("size") is not None or factor not in (2, 4, 8):
            return F.interpolate(x.band(), *args, **kwargs)
        factor = int(factor)

        def compute(rows: range, parts: list[torch.Tensor]) -> torch.Tensor:
            more = F.interpolate(parts[0], *args, **kwargs)
            return more.narrow(dim, rows.start - rows.start // factor * factor, len(rows))

        def needs(rows: range) -> range:
            return range(rows.start // factor, -(-rows.stop // factor))

        example = F.interpolate(map.like, **kwargs)
        return self.defer(Map([size * factor for size in map.sizes], example, map.device, [map], needs, compute))

    def band(self, map: Map) -> torch.Tensor:
        """This rank's band of a map, in one piece."""
        if map.pieces is None:
            result, start = None, self._own(map).start
            for rows, part in self._parts(map, last=True):
                if result is None:
                    result = part.new_empty(map.like.shape)
                result.narrow(self._bands.dim, rows.start - start, len(rows)).copy_(part)
            map.hold([(start, result)])
        elif len(map.pieces) > 1:
            map.hold([(map.pieces[0][0], torch.cat([part for _, part in map.pieces], dim=self._bands.dim))])
        return map.pieces[0][1]

    def _hold(self, map: Map) -> None:
        map.hold([(rows.start, part) for rows, part in self._parts(map, last=True)])

    def _own(self, map: Map) -> range:
        return share(map.sizes, self._bands.rank)

    def _parts(self, map: Map, last: bool = False) -> Iterator[tuple[range, torch.Tensor]]:
        """A band's rows, from the first to the last; if for the ``last`` time, maps beneath are given up on the way."""
        own, held = self._own(map), _held(map)
        wanted = [map.wanted(share(map.sizes, rank)) for rank in range(self._bands.ranks)]
        around = {x: self._borrow(x, [each[x] for each in wanted]) for x in held}
        mentioned = {one().map for one in self._handles if one() is not None} - {map}
        kept = {x for other in mentioned for x in other.beneath(end=map)}
        freed = [x for x in held if last and x is not map and x not in kept]
        chunk = self._chunk(map)
        for start in range(own.start, own.stop, chunk):
            rows = range(start, min(start + chunk, own.stop))
            yield rows, self._compute(map, rows, around)
            if rows.stop < own.stop:
                below = map.wanted(range(rows.stop, own.stop))
                for x in freed:
                    x.pieces = [(first, part) for first, part in x.pieces if first + self._rows(part) > below[x].start]

    def _chunk(self, map: Map) -> int:
        if self._chunk_rows != "auto":
            return self._chunk_rows
        row = sum(x.workspace for x in map.beneath() if x.pieces is None) / len(self._own(map))
        return max(1, int(devices.free_memory() // (4 * max(row, 1))))

    def _borrow(self, map: Map, needs: list[range]) -> list[tuple[int, torch.Tensor]]:
        """The rows that other ranks hold and this one needs, each piece with its first row."""
        own, need = self._own(map), needs[self._bands.rank]
        above, below = self._bands.borrow(partial(self._cut, map.pieces), map.pieces[0][1], map.sizes, needs)
        pieces = [(need.start, above), (max(own.stop, need.start), below)]
        return [(first, part) for first, part in pieces if part is not None]

    def _compute(self, map: Map, rows: range, around: dict[Map, list]) -> torch.Tensor:
        wanted = map.wanted(rows)
        parts: dict[Map, torch.Tensor] = {}
        waiting = {one: sum(x is one for other in wanted for x in other.inputs) for one in wanted}
        for one in reversed(wanted):
            if one.pieces is not None:
                parts[one] = self._cut([*one.pieces, *around[one]], wanted[one])
                continue
            need = one.needs(wanted[one])
            taken = [parts[x].narrow(self._bands.dim, need.start - wanted[x].start, len(need)) for x in one.inputs]
            for x in one.inputs:
                waiting[x] -= 1
                if not waiting[x]:
                    del parts[x]
            parts[one] = one.compute(wanted[one], taken)
        return parts[map]

    def _cut(self, pieces: list[tuple[int, torch.Tensor]], rows: range) -> torch.Tensor:
        parts = []
        for first, part in sorted(pieces, key=lambda piece: piece[0]):
            start, stop = max(rows.start, first), min(rows.stop, first + self._rows(part))
            if start < stop:
                parts.append(part.narrow(self._bands.dim, start - first, stop - start))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=self._bands.dim)

    def _rows(self, part: torch.Tensor) -> int:
        return part.shape[self._bands.dim]


def _held(map: Map) -> list[Map]:
    return [x for x in map.beneath() if x.pieces is not None]


def same_rows(rows: range) -> range:
    return rows
