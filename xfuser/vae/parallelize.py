"""Parallel VAE: run the encoder and decoder of any Diffusers VAE on bands of rows.

No module of the VAE is replaced. While its encoder or decoder runs, a ``TorchFunctionMode`` replaces the few functions
that mix rows (``operations.py``); all others work on a band as on a full image. Unsupported functions that may mix rows
raise an error with their name. Patches that exchange halos are from DistVAE (in xDiT, arXiv 2411.01738).
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from xfuser.core.distributed.utils import share, split_sizes
from xfuser.core.randomness import RandomWatch
from xfuser.vae import functions
from xfuser.vae.bands import Bands
from xfuser.vae.deferred import Deferral, DeferredMap, computed
from xfuser.vae.operations import SDPA, Operations, keep_padding, padding_of

CODERS = ("encoder", "decoder")
ROWS = "_dimension_of_rows"  # attribute of a map whose dimensions were reordered
SPLITS = ("auto", "height", "width")


class OnBands(TorchFunctionMode):
    """While active, functions that mix rows operate on bands."""

    def __init__(self, bands: Bands, chunk_rows: int | str | None) -> None:
        super().__init__()
        self._bands, self._draws = bands, False
        self._deferral = Deferral(bands, chunk_rows) if chunk_rows else None
        on = Operations(bands, self._deferral)
        self._handlers: dict[Any, Callable[..., Tensor]] = {
            **{conv: partial(on.convolution, conv) for conv in (torch.conv2d, torch.conv3d)},
            **{function: partial(on.pooling, function) for function in functions.POOLING},
            **{function: partial(self._drawn, function) for function in functions.NOISE},
            **{F.pad: on.pad, F.group_norm: on.group_norm, SDPA: on.attention},
            **{torch.matmul: on.matmul, torch.Tensor.matmul: on.matmul},
        }

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if self._deferral and kind is None:
            self._deferral.settle()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func is F.dropout and not kwargs.get("training", args[2] if len(args) > 2 else True):
            return args[0]
        if self._deferral:
            in_place = functions.changes_in_place(func, kwargs)
            if in_place:
                self._deferral.settle()
            if in_place or func not in functions.DEFERRING:
                args, kwargs = computed(args), computed(kwargs)
        self._refuse_mixing(func, args, kwargs)
        if func in functions.PADDING:
            return self._handlers[func](*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        result = self._run(func, args, kwargs, any(isinstance(x, DeferredMap) for x in inputs))
        self._follow_rows(func, args, kwargs, inputs, result)
        if any(map(padding_of, inputs)) and any(isinstance(x, Tensor) for x in tree_leaves(result)):
            return keep_padding(self._bands, func, inputs, result)
        return result

    def _refuse_mixing(self, func: Any, args: tuple, kwargs: dict) -> None:
        if func in functions.REFUSED or (func in functions.REDUCTIONS and self._mixes_rows(func, *args, **kwargs)):
            raise self._bands.refusal(f"{func.__name__} may mix the rows of the image, which are on different ranks")
        if func is F.interpolate and kwargs.get("mode", "nearest") not in ("nearest", "nearest-exact"):
            raise self._bands.refusal(f"interpolation with mode={kwargs['mode']!r} mixes rows, which is not supported")

    def _run(self, func: Any, args: tuple, kwargs: dict, deferred: bool) -> Any:
        if handler := self._handlers.get(func):
            return handler(*args, **kwargs)
        if deferred and func is F.interpolate:
            return self._deferral.upsampled(*args, **kwargs)
        if deferred and func in functions.POINTWISE and not kwargs.get("inplace"):
            return self._deferral.pointwise(func, args, kwargs)
        return func(*args, **kwargs)

    def _follow_rows(self, func: Any, args: tuple, kwargs: dict, inputs: list[Tensor], result: Any) -> None:
        """Record the dimension of rows after a reordering: shapes alone do not show it if two sizes are equal."""
        if func in functions.MOVES:
            (x,) = inputs
            rows = getattr(x, ROWS, None)
            if rows is None and x.dim() >= 4 and self._bands.holds_map(x):
                rows = x.dim() + self._bands.dim
            if rows is not None:
                numbers = torch.empty(list(range(x.dim())), device="meta")  # a dimension's length is its number
                setattr(result, ROWS, func(numbers, *args[1:], **kwargs).shape.index(rows))
            return
        moved = next((x for x in inputs if hasattr(x, ROWS)), None)
        for y in tree_leaves(result) if moved is not None else ():
            rows = getattr(moved, ROWS)
            if isinstance(y, Tensor) and y.dim() == moved.dim() and y.shape[rows] == moved.shape[rows]:
                setattr(y, ROWS, rows)

    def _drawn(self, function: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Noise: all ranks draw the noise of the full map, as one device does, and keep their own rows."""
        like = args[0] if args and isinstance(args[0], Tensor) else kwargs.pop("input", None)
        size = like.shape if like is not None else kwargs.pop("size", None) or args
        size = list(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        own, full = self._bands.of_map(size, function.__name__)
        options = kwargs if like is None else {"dtype": like.dtype, "device": like.device} | kwargs
        self._draws = True
        noise = functions.NOISE[function](full, **options)
        self._draws = False
        return noise if own is None else noise.narrow(self._bands.dim, own.start, len(own))

    def refuse_draw(self, operator: str) -> None:
        """Raise a ValueError if an operator is about to draw random numbers only for this rank's rows."""
        if not self._draws:
            raise self._bands.refusal(f"{operator} draws different random numbers on each rank, which is not supported")

    def _mixes_rows(self, func: Any, x: Tensor, *args: Any, **kwargs: Any) -> bool:
        """Whether a reduction over a feature map, such as a norm or a sum, mixes its rows."""
        rows = getattr(x, ROWS, None)
        rows = self._bands.rows_of(x) if rows is None else rows
        if rows is None:
            return False
        if func in (F.layer_norm, F.rms_norm):
            return len(kwargs.get("normalized_shape") or args[0]) >= x.dim() - rows
        place = 1 if func.__name__ in ("norm", "topk", "vector_norm") else 0
        dims = kwargs.get("dim", args[place] if len(args) > place else None)
        if isinstance(dims, Tensor) or "other" in kwargs:
            return False  # elementwise maximum or minimum of two tensors
        if dims is None or isinstance(dims, bool):
            return True
        return any(dim % x.dim() == rows for dim in ([dims] if isinstance(dims, int) else dims))


def parallelize_vae(
    vae: nn.Module, group: dist.ProcessGroup | None = None, split: str = "auto", chunk_rows: int | str | None = None
) -> Callable[[], None]:
    """Run a VAE's encoder and decoder on all ranks of a group, each on a band of rows; all get the full result.

    Args:
        vae: any Diffusers VAE with an ``encoder`` and a ``decoder`` that take ``[B, C, H, W]`` or
            ``[B, C, T, H, W]``. Its weights and inputs must be the same on all ranks.
        group: the ranks; all ranks by default.
        split: ``"height"``, ``"width"``, or ``"auto"`` for the longer one.
        chunk_rows: output rows (columns, if those are split) that a convolution computes at a time, which bounds its
            workspace; also useful on one rank. ``"auto"`` uses as many rows as need a quarter of the free memory.

    Returns:
        A function that restores the VAE.

    Raises:
        ValueError: the VAE has neither an encoder nor a decoder, or is already parallel, or a value is invalid. During
            a call: an operation that mixes rows is not supported.
    """
    check_values(split, chunk_rows)
    coders = coders_of(vae)
    if not coders:
        raise ValueError(f"{type(vae).__name__} has no encoder and no decoder to run in parallel")
    if any("forward" in vars(coder) for coder in coders.values()):
        raise ValueError(f"{type(vae).__name__} is parallel already, or its forward has been replaced")
    group = group or dist.group.WORLD
    for name, coder in coders.items():
        unit = compression(vae) if name == "encoder" else 1
        coder.forward = _on_bands(coder.forward, group, unit, split, chunk_rows)

    def undo() -> None:
        for coder in coders.values():
            del coder.forward

    return undo


def coders_of(vae: nn.Module) -> dict[str, nn.Module]:
    """The encoder and decoder of a VAE by name, without those that it lacks."""
    return {name: coder for name in CODERS if isinstance(coder := getattr(vae, name, None), nn.Module)}


def check_values(split: str, chunk_rows: int | str | None) -> None:
    """Raise a ValueError for values that :func:`parallelize_vae` does not support."""
    if split == "frames":
        raise ValueError("vae_split='frames': VAEs go through frames one after the other; use height, width or auto")
    if split not in SPLITS:
        raise ValueError(f"vae_split={split!r} is unknown; known are {', '.join(SPLITS)}")
    if chunk_rows not in (None, "auto") and (not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise ValueError(f"vae_chunk_rows={chunk_rows!r} must be auto or a whole number of 1 or more")


def compression(vae: nn.Module) -> int:
    """Image rows per row of latents, or a multiple of that number if the class does not report it."""
    for name in ("spatial_compression_ratio", "scale_factor_spatial"):
        if found := getattr(vae, name, None) or getattr(vae.config, name, None):
            return int(found)
    names = ("block_out_channels", "encoder_block_out_channels", "down_block_out_channels", "ch_mult")
    widths = [vae.config[name] for name in names if name in vae.config]
    return 2 ** (len(widths[0]) - 1) if widths else 32


def _on_bands(
    original: Callable, group: dist.ProcessGroup, unit: int, split: str, chunk_rows: int | str | None
) -> Callable:
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)

    @wraps(original)
    def forward(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        dim = -1 if split == "width" or (split == "auto" and x.shape[-1] > x.shape[-2]) else -2
        rows = x.shape[dim]
        if 1 < ranks > rows // unit:
            return original(x, *args, **kwargs)  # too few rows to divide: every rank computes all of them
        sizes = [size * unit for size in split_sizes(rows // unit, ranks)]
        sizes[-1] += rows % unit
        band = share(sizes, rank)
        bands = Bands(dim, sizes, x.shape[-3 - dim], group)
        mode = OnBands(bands, chunk_rows)
        with RandomWatch(mode.refuse_draw), mode:
            output = original(x.narrow(dim, band.start, len(band)), *args, **kwargs)
        output = computed(output)
        first, *caches = output if isinstance(output, tuple) else (output,)
        full = bands.gather(first, bands.sizes(first.shape[dim], "the output"), dim)
        return (full, *caches) if isinstance(output, tuple) else full  # each rank keeps its convolution caches

    return forward
