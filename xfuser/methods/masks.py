"""Attention masks over pairs of tokens."""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from xfuser.core.attention.kernels import additive
from xfuser.methods.tokens import Rows

Segments = list[tuple[int, int, bool]]  # first token, end (exclusive), whether causal: tokens see no later ones


class PairMasks:
    """The masks over pairs of one model in one call: which of them only hide keys.

    Reading a value stalls the accelerator. So only the first mask of each shape is read; whether all others were like
    it is read once, at the end of the call.
    """

    def __init__(self, model: str) -> None:
        self._model = model
        self._hide_keys: dict[tuple, bool] = {}  # by the forward's index and the mask's shape
        self._alike: Tensor | None = None

    def over_keys(self, index: int, mask: Tensor, q: Tensor, k: Tensor) -> Tensor:
        """The key mask that can replace a mask over pairs, or the mask itself if there is none.

        A key mask can replace one over this rank's tokens that hides some from all others, and all others from these:
        what hidden tokens attend to does not matter, as no token attends to them.

        Args:
            index: index of the forward within its step.
            mask: ``[B|1, H|1, 1|Sq, Sk]``.
        """
        if mask.stride(2) == 0:  # the same for all queries
            return mask[:, :, :1]
        if mask.dtype != torch.bool or mask.shape[2:] != (q.shape[2], k.shape[2]) or q.shape[2] != k.shape[2]:
            return mask
        shown = mask.diagonal(dim1=2, dim2=3).unsqueeze(2)
        hides, place = (mask == (shown & shown.mT)).all(), (index, mask.shape)
        if place not in self._hide_keys:
            self._hide_keys[place] = bool(hides)
        elif self._hide_keys[place]:
            self._alike = hides if self._alike is None else self._alike & hides
        return shown if self._hide_keys[place] else mask

    @contextmanager
    def alike(self) -> Iterator[None]:
        """Around a call: raise a ValueError at its end if a mask that was not read is unlike the first of its shape."""
        yield
        if self._alike is not None and not self._alike:
            raise ValueError(
                f"an attention mask of {self._model} hides tokens from some others, but the first of its shape hid"
                " them from all: use CFG or data parallelism, which do not split masks"
            )


def cut_pairs(
    mask: Tensor, queries: Rows, ranks: range, keys: Rows, columns: list[tuple[int, int]], dtype: torch.dtype
) -> Tensor:
    """Cut a mask over the full sequence to the queries of ``ranks`` and to these columns.

    Raises:
        ValueError: the mask does not fit the sequence.
    """
    if mask.shape[2] not in (1, queries.total) or mask.shape[3] != keys.total:
        raise ValueError(
            f"an attention mask of shape {tuple(mask.shape)} fits neither the keys of this rank, [B, 1, 1, keys],"
            f" nor the whole sequence, [B, 1, 1 or {queries.total}, {keys.total}]: it cannot be split"
        )
    if mask.shape[2] > 1:
        mask = torch.cat([mask.narrow(2, *place) for rank in ranks for place in queries.places(rank)], dim=2)
    return additive(torch.cat([mask.narrow(3, *place) for place in columns], dim=3), dtype)


def segment_mask(segments: Segments, tokens: int, valid: Tensor | None, device: torch.device) -> Tensor:
    """The keys that each token sees, bool ``[B or 1, 1, tokens, tokens]``: tokens of a segment see those of it and of
    earlier ones, and tokens after the segments see all.

    Args:
        valid: keys that may be seen, ``[B, tokens]``.
    """
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    for start, end, causal in segments:
        mask[start:end, end:] = False
        if causal:
            mask[start:end, start:end] = mask[start:end, start:end].tril()
    return mask[None, None] if valid is None else mask & valid.bool()[:, None, None]
