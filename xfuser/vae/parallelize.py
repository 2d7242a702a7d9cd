"""Parallel VAE: the encoder and the decoder of any VAE of Diffusers, on bands of rows.

Nothing of the VAE is replaced. While its encoder or decoder runs, a ``TorchFunctionMode`` takes the place of the few
functions that mix rows (``operations.py``); all others work on a band as they do on a whole picture. What would mix
rows unseen is refused by name. The idea of patches that exchange halos is DistVAE's (in xDiT, arXiv 2411.01738).
"""

from collections.abc import Callable
from functools import partial, wraps
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from xfuser.core.distributed.utils import share, split_sizes
from xfuser.core.randomness import RandomWatch
from xfuser.vae import operations
from xfuser.vae.bands import Bands
from xfuser.vae.deferred import ABOUT, POINTWISE, Deferral, DeferredMap, computed

CODERS = ("encoder", "decoder")
ROWS = "_dimension_of_rows"  # attribute of a map whose dimensions were moved
SPLITS = ("auto", "height", "width")
PADDING = (F.pad, torch.conv2d, torch.conv3d)  # know of padding that is left to a convolution
POOLING = (F.avg_pool2d, F.avg_pool3d, F.max_pool2d, F.max_pool3d)
REFUSED = {  # functions that may mix rows, and are not known
    F.adaptive_avg_pool2d,
    F.adaptive_avg_pool3d,
    F.adaptive_max_pool2d,
    F.adaptive_max_pool3d,
    F.batch_norm,
    F.conv_transpose2d,
    F.conv_transpose3d,
    F.fold,
    F.grid_sample,
    F.instance_norm,
    F.softmax,
    F.unfold,
    torch.bmm,
    torch.Tensor.cumsum,
    torch.cumsum,
    torch.einsum,
    torch.fft.fft2,
    torch.fft.fftn,
    torch.Tensor.flip,
    torch.flip,
    torch.roll,
    torch.softmax,
    torch.Tensor.__matmul__,
    torch.Tensor.softmax,
}
NOISE = {torch.rand: torch.rand, torch.rand_like: torch.rand, torch.randn: torch.randn, torch.randn_like: torch.randn}
MOVES = {  # of dimensions: functions whose result has those of their input in another order
    getattr(owner, name)
    for owner in (torch, torch.Tensor)
    for name in ("movedim", "moveaxis", "permute", "swapaxes", "swapdims", "transpose")
}
DEFERRING = ABOUT | POINTWISE | {F.group_norm, F.interpolate, F.pad, torch.conv2d, torch.conv3d}
REDUCTIONS = {
    F.layer_norm,
    F.rms_norm,
    torch.linalg.vector_norm,
    torch.std_mean,
    torch.var_mean,
    *(
        getattr(owner, name)
        for owner in (torch, torch.Tensor)
        for name in (
            *("amax", "amin", "argmax", "argmin", "argsort", "cumprod", "logsumexp", "max", "mean", "median", "min"),
            *("nanmean", "nansum", "norm", "prod", "sort", "std", "sum", "topk", "var"),
        )
    ),
}


class OnBands(TorchFunctionMode):
    """While active, functions that mix rows work on bands."""

    def __init__(self, bands: Bands, chunk_rows: int | str | None) -> None:
        super().__init__()
        self._bands = bands
        self._deferral = deferral = Deferral(bands, chunk_rows) if chunk_rows else None
        convolution = operations.convolution
        self._handlers: dict[Any, Callable[..., torch.Tensor]] = {
            torch.conv2d: partial(convolution, bands, deferral, torch.conv2d),
            torch.conv3d: partial(convolution, bands, deferral, torch.conv3d),
            F.pad: partial(operations.pad, bands, deferral),
            F.group_norm: partial(operations.group_norm, bands, deferral),
            **{function: partial(operations.pooling, bands, function) for function in POOLING},
            operations.SDPA: partial(operations.attention, bands),
            torch.matmul: partial(operations.matmul, bands),
            torch.Tensor.matmul: partial(operations.matmul, bands),
            **{function: partial(self._drawn, function) for function in NOISE},
        }
        self._draws = False

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        super().__exit__(kind, error, trace)
        if self._deferral and kind is None:
            self._deferral.settle()

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        handler = self._handlers.get(func)
        if func is F.dropout and not kwargs.get("training", args[2] if len(args) > 2 else True):
            return args[0]
        deferred = self._deferral and any(isinstance(x, DeferredMap) for x in tree_leaves((args, kwargs)))
        if self._deferral and _in_place(func, kwargs):
            self._deferral.settle()
            args, kwargs = computed(args), computed(kwargs)
        elif deferred and func not in DEFERRING:
            args, kwargs = computed(args), computed(kwargs)
        if func in REFUSED or (func in REDUCTIONS and self._mixes_rows(func, *args, **kwargs)):
            raise ValueError(
                f"{self._bands.owner}: {func.__name__} may mix the rows of the picture, which lie on different ranks."
                f" {self._bands.advice}"
            )
        if func is F.interpolate and kwargs.get("mode", "nearest") not in ("nearest", "nearest-exact"):
            raise ValueError(
                f"{self._bands.owner}: interpolation with mode={kwargs['mode']!r} mixes rows, which is not supported"
            )
        if func in PADDING:
            return handler(*args, **kwargs)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if handler:
            result = handler(*args, **kwargs)
        elif deferred and func is F.interpolate:
            result = self._deferral.upsampled(*args, **kwargs)
        elif deferred and func in POINTWISE and not kwargs.get("inplace"):
            result = self._deferral.pointwise(func, args, kwargs)
        else:
            result = func(*args, **kwargs)
        self._follow_rows(func, args, kwargs, inputs, result)
        made = any(isinstance(x, torch.Tensor) for x in tree_leaves(result))
        if made and any(operations.padding_of(x) for x in inputs):
            return operations.keep_padding(self._bands, func, inputs, result)
        return result

    def _follow_rows(self, func: Any, args: tuple, kwargs: dict, inputs: list[torch.Tensor], result: Any) -> None:
        """Note which dimension rows are along, where dimensions were moved: shapes tell channels from columns only
        where they differ."""
        if func in MOVES:
            (x,) = inputs
            rows = getattr(x, ROWS, None)
            rows = x.dim() + self._bands.dim if rows is None and x.dim() >= 4 and self._bands.holds_map(x) else rows
            if rows is not None:
                numbers = torch.empty(list(range(x.dim())), device="meta")  # a dimension's length is its number
                setattr(result, ROWS, func(numbers, *args[1:], **kwargs).shape.index(rows))
            return
        moved = next((x for x in inputs if hasattr(x, ROWS)), None)
        for y in tree_leaves(result) if moved is not None else ():
            if isinstance(y, torch.Tensor) and y.dim() == moved.dim():
                rows = getattr(moved, ROWS)
                if y.shape[rows] == moved.shape[rows]:
                    setattr(y, ROWS, rows)

    def _drawn(self, function: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Noise: all ranks draw that of the whole map, as one device does, and keep their rows of it."""
        like = args[0] if args and isinstance(args[0], torch.Tensor) else kwargs.pop("input", None)
        size = like.shape if like is not None else kwargs.pop("size", None) or args
        size = list(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        own, whole = self._bands.of_map(size, function.__name__)
        options = kwargs if like is None else {"dtype": like.dtype, "device": like.device} | kwargs
        self._draws = True
        noise = NOISE[function](whole, **options)
        self._draws = False
        return noise if own is None else noise.narrow(self._bands.dim, own.start, len(own))

    def refuse_draw(self, operator: str) -> None:
        """Raise a ValueError where an operator is about to draw random numbers for this rank's rows alone."""
        if not self._draws:
            raise ValueError(
                f"{self._bands.owner}: {operator} draws random numbers in a way that is not supported, other ones on"
                f" each rank; {', '.join(sorted(one.__name__ for one in NOISE))} are. {self._bands.advice}"
            )

    def _mixes_rows(self, func: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> bool:
        """Whether a norm, a sum or the like over a feature map goes over its rows."""
        rows = getattr(x, ROWS, None)
        rows = self._bands.rows_of(x) if rows is None else rows
        if rows is None:
            return False
        if func in (F.layer_norm, F.rms_norm):
            return len(kwargs.get("normalized_shape") or args[0]) >= x.dim() - rows
        place = 1 if func.__name__ in ("norm", "topk", "vector_norm") else 0
        dims = kwargs.get("dim", args[place] if len(args) > place else None)
        if isinstance(dims, torch.Tensor) or "other" in kwargs:
            return False  # the larger, or smaller, of two in each place
        if dims is None or isinstance(dims, bool):
            return True
        return any(dim % x.dim() == rows for dim in ([dims] if isinstance(dims, int) else dims))


def _in_place(func: Any, kwargs: dict[str, Any]) -> bool:
    name = getattr(func, "__name__", "")
    changes = name.endswith("_") and not name.endswith("__")
    return changes or name == "__setitem__" or name.startswith("__i") or bool(kwargs.get("inplace")) or "out" in kwargs


def parallelize_vae(
    vae: nn.Module, group: dist.ProcessGroup | None = None, split: str = "auto", chunk_rows: int | str | None = None
) -> Callable[[], None]:
    """Let a VAE encode and decode on all ranks of a group, each with a band of rows; every rank gets the whole result.

    Args:
        vae: any VAE of Diffusers with an ``encoder`` and a ``decoder`` that take ``[B, C, H, W]`` or
            ``[B, C, T, H, W]``. Its weights are the same on all ranks, and so are its inputs.
        group: the ranks; all by default.
        split: ``"height"``, ``"width"``, or ``"auto"``: the longer one.
        chunk_rows: output rows (columns, if those are split) that a convolution computes at a time, which bounds its
            workspace; also of use on one rank. ``"auto"``: as many as need a quarter of the free memory.

    Returns:
        A function that undoes it.

    Raises:
        ValueError: the VAE has neither an encoder nor a decoder, or is parallel already; or a wrong value. During a
            call: an operation that mixes rows is not known.
    """
    check_values(split, chunk_rows)
    _check_class(vae)
    group = group or dist.group.WORLD
    for name in CODERS:
        coder = getattr(vae, name, None)
        if isinstance(coder, nn.Module):
            unit = compression(vae) if name == "encoder" else 1
            coder.forward = _on_bands(coder.forward, group, unit, split, chunk_rows)

    def undo() -> None:
        for name in CODERS:
            if isinstance(getattr(vae, name, None), nn.Module):
                del getattr(vae, name).forward

    return undo


def check_values(split: str, chunk_rows: int | str | None) -> None:
    """Raise a ValueError for values that :func:`parallelize_vae` does not take."""
    if split == "frames":
        raise ValueError(
            "vae_split='frames': the VAEs of Diffusers go through frames one after the other, each with what the one"
            " before left, or treat the first frame apart: no rank can begin in the middle. Use height, width or auto"
        )
    if split not in SPLITS:
        raise ValueError(f"vae_split={split!r} is unknown; known are {', '.join(SPLITS)}")
    if chunk_rows not in (None, "auto") and (not isinstance(chunk_rows, int) or chunk_rows < 1):
        raise ValueError(f"vae_chunk_rows={chunk_rows!r} must be auto or a whole number of 1 or more")


def _check_class(vae: nn.Module) -> None:
    coders = [getattr(vae, name, None) for name in CODERS]
    if not any(isinstance(coder, nn.Module) for coder in coders):
        raise ValueError(f"{type(vae).__name__} has no encoder and no decoder to run in parallel")
    if any("forward" in vars(coder) for coder in coders if isinstance(coder, nn.Module)):
        raise ValueError(f"{type(vae).__name__} is parallel already, or its forward has been replaced")


def compression(vae: nn.Module) -> int:
    """Rows of a picture that become one row of latents, or a multiple of them where a class does not tell."""
    config = vae.config
    for name in ("spatial_compression_ratio", "scale_factor_spatial"):
        found = getattr(vae, name, None) or getattr(config, name, None)
        if found:
            return int(found)
    names = ("block_out_channels", "encoder_block_out_channels", "down_block_out_channels", "ch_mult")
    widths = [config[name] for name in names if name in config]
    return 2 ** (len(widths[0]) - 1) if widths else 32


def _on_bands(
    original: Callable, group: dist.ProcessGroup, unit: int, split: str, chunk_rows: int | str | None
) -> Callable:
    ranks, rank = dist.get_world_size(group), dist.get_rank(group)

    @wraps(original)
    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        dim = -1 if split == "width" or (split == "auto" and x.shape[-1] > x.shape[-2]) else -2
        rows = x.shape[dim]
        if 1 < ranks > rows // unit:
            return original(x, *args, **kwargs)  # too few rows to divide: every rank computes them all
        sizes = [size * unit for size in split_sizes(rows // unit, ranks)]
        sizes[-1] += rows % unit
        band = share(sizes, rank)
        bands = Bands(dim, sizes, x.shape[-3 - dim], group)
        mode = OnBands(bands, chunk_rows)
        with RandomWatch(mode.refuse_draw), mode:
            output = original(x.narrow(dim, band.start, len(band)), *args, **kwargs)
        output = computed(output)
        if isinstance(output, tuple):  # what follows are caches of the convolutions, which stay with their bands
            return (_whole(bands, output[0]), *output[1:])
        return _whole(bands, output)

    return forward


def _whole(bands: Bands, x: torch.Tensor) -> torch.Tensor:
    return bands.gather(x, bands.sizes(x.shape[bands.dim], "the output"), bands.dim)
