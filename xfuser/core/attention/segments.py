"""A pair mask for sequences with segments that attend only to themselves and to earlier tokens."""

import torch
from torch import Tensor

Segments = list[tuple[int, int, bool]]  # first token, end (exclusive), whether causal: tokens see no later ones


def segment_mask(segments: Segments, tokens: int, valid: Tensor | None, device: torch.device) -> Tensor:
    """Which keys each token sees, bool ``[B or 1, 1, tokens, tokens]``; tokens after the segments see all.

    Args:
        valid: keys that may be seen, ``[B, tokens]``.
    """
    mask = torch.ones(tokens, tokens, dtype=torch.bool, device=device)
    for start, end, causal in segments:
        mask[start:end, end:] = False
        if causal:
            mask[start:end, start:end] = mask[start:end, start:end].tril()
    return mask[None, None] if valid is None else mask & valid.bool()[:, None, None]
