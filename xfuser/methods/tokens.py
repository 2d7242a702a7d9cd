"""Which tokens a forward computes, and which of them this rank holds."""

from dataclasses import dataclass

import torch

from xfuser.core.distributed.utils import split_sizes
from xfuser.models.plan import Tokens


@dataclass(frozen=True)
class Window:
    """The part of the streams that one forward computes: consecutive image tokens, with the text or without."""

    image: range
    text: bool = True


class TokenShares:
    """Rows of each stream that the ranks of a group hold during one forward: consecutive ones, in rank order.

    Args:
        rank, ranks: this rank's place in the group and the group's size; 0 and 1 where every rank holds everything.
        image, text: tokens of the whole streams.
        window: the tokens that this forward computes, and the ranks share.
    """

    def __init__(self, rank: int, ranks: int, image: int, text: int, window: Window) -> None:
        self.rank, self.ranks, self.window = rank, ranks, window
        self.totals = {"image": image, "text": text}
        self._active = {"image": window.image, "text": range(text if window.text else 0)}
        # The streams' longer shares lie at opposite ends of the group, which evens the totals out.
        self.sizes = {
            "image": split_sizes(len(window.image), ranks),
            "text": split_sizes(len(self._active["text"]), ranks)[::-1],
        }
        self._tables: dict[tuple[int, Tokens], tuple[torch.Tensor, torch.Tensor]] = {}

    @property
    def is_whole(self) -> bool:
        """Whether this rank holds all tokens."""
        return self.ranks == 1 and all(len(self._active[stream]) == total for stream, total in self.totals.items())

    def lengths(self, streams: tuple[str, ...]) -> list[int]:
        """Rows of each rank in a sequence made of these streams."""
        return [sum(counts) for counts in zip(*(self.sizes[stream] for stream in streams), strict=True)]

    def places(self, streams: tuple[str, ...]) -> list[tuple[int, int]]:
        """Where the ranks' rows, one rank after the other, lie in the whole sequence: (first row, number of rows)."""
        return [self._place(streams, stream, rank) for rank in range(self.ranks) for stream in streams]

    def _place(self, streams: tuple[str, ...], stream: str, rank: int) -> tuple[int, int]:
        before = sum(self.totals[name] for name in streams[: streams.index(stream)])
        sizes = self.sizes[stream]
        return before + self._active[stream].start + sum(sizes[:rank]), sizes[rank]

    def cut_table(self, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """As :meth:`cut`, for a tensor that every block is given anew: cut once, then remembered."""
        key = (id(x), tokens)
        if key not in self._tables:
            self._tables[key] = x, self.cut(x, tokens)
        return self._tables[key][1]

    def cut(self, x: torch.Tensor, tokens: Tokens) -> torch.Tensor:
        """This rank's rows of a tensor that holds the whole streams."""
        totals = [self.totals[stream] for stream in tokens.streams]
        if x.shape[tokens.dim] != sum(totals):
            raise ValueError(
                f"a per-token argument of shape {tuple(x.shape)} has {x.shape[tokens.dim]} entries along dimension"
                f" {tokens.dim}, where {'+'.join(tokens.streams)} have {'+'.join(map(str, totals))} tokens"
            )
        if self.is_whole:
            return x
        places = [self._place(tokens.streams, stream, self.rank) for stream in tokens.streams]
        return torch.cat([x.narrow(tokens.dim, *place) for place in places], dim=tokens.dim)
