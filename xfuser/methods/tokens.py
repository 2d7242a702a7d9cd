"""Which tokens a forward computes, and which of them this rank holds."""

from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from xfuser.core.distributed.utils import split_sizes
from xfuser.models.plan import PICTURE, Streams, Tokens


@dataclass(frozen=True)
class Window:
    """The part of the streams that one forward computes: consecutive image tokens, with or without the text.

    ``behind`` are further image tokens that it computes, at the end of the stream: those of reference images.
    """

    image: range
    text: bool = True
    behind: range = range(0)

    @property
    def ranges(self) -> tuple[range, ...]:
        """All image tokens that the forward computes."""
        return (self.image, self.behind) if self.behind else (self.image,)


class Part(NamedTuple):
    """One stream's rows in a sequence: split over the ranks, in rank order in ``ranges``, or whole on every rank.

    ``givers`` are the ranks whose rows are used as keys. With ``lines`` above 1, the sequence consists of that many
    lines of equal length, and each rank holds its part of each line.
    """

    ranges: tuple[range, ...]
    sizes: list[int]
    split: bool
    givers: range
    lines: int = 1

    def places(self, rank: int) -> list[tuple[int, int]]:
        """A rank's rows: (first row, number of rows)."""
        first, length = (count // self.lines for count in (sum(self.sizes[:rank]) * self.split, self.sizes[rank]))
        if self.lines > 1:
            line = sum(self.sizes) // self.lines
            return [(self.ranges[0].start + number * line + first, length) for number in range(self.lines)]
        found = []
        for rows in self.ranges:
            own = rows[max(first, 0) : max(first + length, 0)]
            found += [(own.start, len(own))] if own else []
            first -= len(rows)
        return found or [(self.ranges[0].start, 0)]


class Rows:
    """The rows of a sequence of streams that each rank holds.

    Every rank has queries for all rows that it holds. If all ranks hold a stream, the first rank gives its keys;
    ballast text gives no keys.
    """

    def __init__(self, parts: list[Part], ranks: int, total: int) -> None:
        self._parts, self._ranks, self.total = parts, ranks, total

    @cached_property
    def lengths(self) -> list[int]:
        """Number of query rows of each rank."""
        return [sum(part.sizes[rank] for part in self._parts) for rank in range(self._ranks)]

    @cached_property
    def key_lengths(self) -> list[int]:
        """Number of key rows that each rank gives."""
        return [sum(length for _, length in self.key_places(rank)) for rank in range(self._ranks)]

    def places(self, rank: int) -> list[tuple[int, int]]:
        """Positions of a rank's rows in the whole sequence: (first row, number of rows)."""
        return [place for part in self._parts for place in part.places(rank)]

    def key_places(self, rank: int) -> list[tuple[int, int]]:
        """Positions of the rows that a rank gives as keys."""
        return [place for part in self._parts if rank in part.givers for place in part.places(rank)]

    @cached_property
    def order(self) -> list[tuple[int, int]]:
        """Positions of the keys of all ranks, in rank order."""
        return [place for rank in range(self._ranks) for place in self.key_places(rank)]

    def in_sequence(self, x: Tensor) -> Tensor:
        """``[B, rows, D]``, ordered as in ``order``, to ``[B, total, D]``: each row at its place, zeros elsewhere."""
        places = self.order
        if x.shape[1] == self.total and places == sorted(places):
            return x
        whole = x.new_zeros(x.shape[0], self.total, x.shape[2])
        for (start, length), part in zip(places, x.split([length for _, length in places], dim=1), strict=True):
            whole[:, start : start + length] = part
        return whole

    def given(self, x: Tensor, dim: int, rank: int) -> Tensor:
        """The rows that a rank gives as keys, from all its rows along ``dim``."""
        if self.key_lengths[rank] == self.lengths[rank]:
            return x
        rows = x.split([part.sizes[rank] for part in self._parts], dim=dim)
        given = [own for own, part in zip(rows, self._parts, strict=True) if rank in part.givers]
        return torch.cat(given, dim=dim) if given else x.narrow(dim, 0, 0)


@dataclass(eq=False)
class TokenShares:
    """The rows of each stream that each rank of a group holds during one forward: consecutive, in rank order.

    Args:
        rank, ranks: this rank's place in the group and the group's size; 0 and 1 if every rank holds everything.
        image, text: token counts of the whole streams; text is None if only the length of each sequence shows it.
        window: the tokens that this forward computes, which are split over the ranks.
        unit: number of image tokens that stay together.
        whole: whether every rank holds all of the text.
        ballast: whether every rank holds one text token, which has no effect, if the window has no text.
        lines: number of lines of tokens in the image; each rank holds its part of each line.
        varies: whether every rank holds all of the text, and its length differs by sequence: that of the sequence minus
            the image's, which may be more or less than ``text``.
    """

    rank: int
    ranks: int
    image: int
    text: int | None
    window: Window
    unit: int = 1
    whole: bool = False
    ballast: bool = False
    lines: int = 1
    varies: bool = False

    def __post_init__(self) -> None:
        ranks, text = self.ranks, self.text or 0
        whole, idle = self.whole or self.varies, self.ballast and not self.window.text
        self._carried = {"image": self.image, "text": text}
        self.totals = {"image": self.image, "text": None if self.varies else self.text, PICTURE: None}
        self._active = {"image": self.window.ranges, "text": (range(text if self.window.text else int(idle)),)}
        self._givers = {"image": range(ranks), "text": range(0 if idle else 1 if whole else ranks)}
        # The longer shares of the two streams are at opposite ends of the group, which evens out the totals.
        count, words = (sum(map(len, self._active[stream])) for stream in ("image", "text"))
        self.sizes = {"image": [size * self.unit for size in split_sizes(count // self.unit, ranks)]}
        self.sizes["text"] = [words] * ranks if whole or idle else split_sizes(words, ranks)[::-1]
        self._known: dict[tuple[Streams, int, int | None], Rows] = {}

    @property
    def own(self) -> dict[str, int]:
        """Number of tokens of each stream that this rank holds, image first."""
        return {stream: sizes[self.rank] for stream, sizes in self.sizes.items()}

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds all tokens."""
        return self.ranks == 1 and self.window == Window(range(self.image))

    def rows(self, streams: Streams, own: int, text: int | None = None) -> Rows:
        """The rows of an attention's sequence, of which this rank holds ``own``.

        ``text`` is the length of text that varies, if this forward computes none of it.

        Raises:
            ValueError: ``own`` is not the number of rows of these streams that this rank holds.
        """
        if (streams, own, text) in self._known:
            return self._known[streams, own, text]
        further = own - self.sizes["image"][self.rank] * ("image" in streams)
        rows = self._rows(streams, further if text is None else text)
        if rows.lengths[self.rank] != own or further < 0:
            raise ValueError(
                f"attention over {own} tokens, but this rank holds {rows.lengths[self.rank]} of {'+'.join(streams)}"
            )
        self._known[streams, own, text] = rows
        return rows

    def _rows(self, streams: Streams, text: int) -> Rows:
        """As :meth:`rows`; ``text`` is the length of a stream whose total is unknown."""
        parts, start = [], 0
        for stream in streams:
            unknown = self.totals[stream] is None
            total = text if unknown else self.totals[stream]
            held = 0 if stream == "text" and not self.window.text else total
            sizes = [held] * self.ranks if unknown else self.sizes[stream]
            givers = range(1) if unknown else self._givers[stream]
            lines = self.lines if stream == "image" else 1
            active = (range(held),) if unknown else self._active[stream]
            ranges = tuple(range(start + rows.start, start + rows.stop) for rows in active)
            parts.append(Part(ranges, sizes, len(givers) == self.ranks, givers, lines))
            start += total
        return Rows(parts, self.ranks, start)

    def total(self, streams: Streams) -> int | None:
        """Number of tokens in a sequence of these streams; None if only the sequence shows it."""
        totals = [self.totals[stream] for stream in streams]
        return None if None in totals else sum(totals)

    def cut(self, x: Tensor, tokens: Tokens) -> Tensor:
        """This rank's rows of a tensor that holds the whole streams."""
        if tokens.rows:
            rows = x.unflatten(tokens.dim, (-1, self.image))
            return self.cut(rows, Tokens(tokens.streams, tokens.dim + 1)).flatten(tokens.dim, tokens.dim + 1)
        length = x.shape[tokens.dim]
        same = length == 1 and sum(self._carried[stream] for stream in tokens.streams) != 1  # one entry for all tokens
        if same or tokens.dims not in (None, x.dim()):
            return x
        rows = self._rows(tokens.streams, length - self.image * ("image" in tokens.streams))
        if length != rows.total:
            counts = [str(self.totals[stream]) for stream in tokens.streams]
            raise ValueError(
                f"a per-token argument of shape {tuple(x.shape)} has {length} entries along dimension {tokens.dim},"
                f" but {'+'.join(tokens.streams)} have {'+'.join(counts)} tokens"
            )
        if self.is_whole:
            return x
        return torch.cat([x.narrow(tokens.dim, *place) for place in rows.places(self.rank)], dim=tokens.dim)

    def without_text(self, x: Tensor, streams: Streams, dim: int) -> Tensor:
        """This rank's rows of streams, without the text, for a forward that computes no text."""
        own = self.sizes["image"][self.rank] * ("image" in streams)
        return x.narrow(dim, 0 if streams[-1] == "text" else x.shape[dim] - own, own)

    def with_text(self, output: Any, outputs: list[Streams], dim: int) -> Any:
        """A block's output, of these streams, with zeros in place of the text that it was not given."""
        if not isinstance(output, Tensor):
            return tuple(self.with_text(x, [streams], dim) for x, streams in zip(output, outputs, strict=True))
        (streams,) = outputs
        if self.window.text or "text" not in streams:
            return output
        text = output.new_zeros([*output.shape[:dim], self._carried["text"], *output.shape[dim + 1 :]])
        return torch.cat([text, output] if streams[0] == "text" else [output, text], dim=dim)

    def leading(self, count: int, stream: str) -> int:
        """How many of a stream's first ``count`` tokens this rank holds."""
        places = self._rows((stream,), 0).places(self.rank)
        return sum(min(max(count - start, 0), length) for start, length in places)
