"""Helpers of the oracles: the layout of tokens in latents, and hooks on the key and value projections."""

import itertools
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from xfuser.models.plan import Attention, ModelPlan, blocks_of

STACKED = ("to_qkv_mlp_proj", "img_qkv_proj", "to_qkv")  # queries, keys and values from one linear
OF_TEXT = ("add_k_proj", "add_v_proj", "txt_kv_proj", "to_k_t", "to_v_t")
PROJECTIONS = ("to_k", "to_v", "to_key", "to_value", *OF_TEXT, *STACKED)


def bands(count: int, parts: int) -> list[slice]:
    """Split ``count`` into consecutive ranges whose lengths differ by at most one, longer ones first."""
    base, extra = divmod(count, parts)
    starts = [i * base + min(i, extra) for i in range(parts + 1)]
    return [slice(a, b) for a, b in itertools.pairwise(starts)]


def layout(model: nn.Module, plan: ModelPlan, latents: torch.Tensor) -> tuple[int, int, int]:
    """Return the dimension that is split, its entries per row of tokens, and the tokens in such a row."""
    size = model.config.get("patch_size") or model.config.get("all_patch_size", [1])[0]
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


@contextmanager
def projecting(model: nn.Module, plan: ModelPlan, state: Any) -> Iterator[None]:
    """Within the context, ``state.project`` replaces the key and value projections of the blocks' attention."""
    with ExitStack() as stack:
        for block in blocks_of(model, replace(plan, blocks=(*plan.ahead, *plan.blocks))):
            for name in plan.convolutions:
                module, name = block.module.get_submodule(name), f"{block.list_name}.{block.index}.{name}"
                stack.callback(module.register_forward_pre_hook(partial(_rows, state, name)).remove)
            linear = {name: Attention(("image",), ("image",)) for name in plan.linear}
            for attention, streams in (plan.attentions() | linear).items():
                for kind in PROJECTIONS:
                    name = f"{block.list_name}.{block.index}.{attention}.{kind}"
                    if name not in dict(model.named_modules()):
                        continue
                    owner = model.get_submodule(name.rpartition(".")[0])
                    columns = keys_and_values(owner, model.get_submodule(name)) if kind in STACKED else slice(None)

                    def hook(
                        m: nn.Module, a: tuple, out: torch.Tensor, name=name, s=streams, c=columns
                    ) -> torch.Tensor:
                        return state.project(name, s.keys, c, out)

                    stack.callback(model.get_submodule(name).register_forward_hook(hook).remove)
        yield


def _rows(state: Any, name: str, module: nn.Module, args: tuple[torch.Tensor]) -> tuple[torch.Tensor]:
    """Hook before a convolution of the grid ``[B, C, rows, columns]``: rows of other parts are the kept ones."""
    (x,) = args
    tokens = state.project(name, ("image",), slice(None), x.flatten(2).transpose(1, 2))
    return (tokens.transpose(1, 2).unflatten(2, x.shape[2:]),)


def keys_and_values(attention: nn.Module, stacked: nn.Linear) -> slice:
    """Return which outputs of a linear for queries, keys and values are the keys and values."""
    width = getattr(attention, "inner_dim", stacked.in_features)
    queries = 2 * width if getattr(attention, "use_differential", False) else width
    return slice(queries, 2 * queries + width)
