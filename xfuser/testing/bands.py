"""How oracles divide latents."""

import itertools

import torch
from torch import nn

from xfuser.models.plan import ModelPlan


def bands(count: int, parts: int) -> list[slice]:
    """Consecutive ranges that differ in length by one at most, longer ones first."""
    base, extra = divmod(count, parts)
    starts = [i * base + min(i, extra) for i in range(parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(starts)]


def layout(model: nn.Module, plan: ModelPlan, latents: torch.Tensor) -> tuple[int, int, int]:
    """The dimension that is divided, its entries per row of tokens, and the tokens in such a row."""
    size = getattr(model.config, "patch_size", 1)
    of_time, of_rows, of_columns = (
        [*([1] * (3 - len(size))), *size] if isinstance(size, list | tuple) else (1, size, size)
    )
    of_time = getattr(model.config, "patch_size_t", None) or of_time
    if latents.dim() == 3:
        return plan.packed, 1, 1
    if latents.dim() == 4:
        return 2, of_rows, latents.shape[3] // of_columns
    height, width = latents.shape[plan.height : plan.height + 2]
    if latents.shape[plan.frames] == of_time:
        return plan.height, of_rows, width // of_columns
    return plan.frames, of_time, (height // of_rows) * (width // of_columns)
