"""The operations that mix rows, on bands: each takes what its namesake in ``torch.nn.functional`` takes."""

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from xfuser.core.distributed.group_coordinator import gather_together
from xfuser.core.distributed.utils import share
from xfuser.vae.bands import Bands, join_moments
from xfuser.vae.deferred import Deferral, DeferredMap, Map, computed, same_rows

SDPA = F.scaled_dot_product_attention  # the real one: a wrapped call puts another function in its place
MOVES = {  # take rows along as they are, or show it by their result's shape
    *("__getitem__", "cat", "clone", "concat", "contiguous", "expand", "flatten", "permute", "repeat", "reshape"),
    *("squeeze", "to", "transpose", "unsqueeze", "view"),
}


class RowPadding:
    """Padding of the whole map's first and last rows that has been asked for, and is left to the convolution behind."""

    def __init__(self, top: int, bottom: int, mode: str, value: float) -> None:
        self.top, self.bottom, self.mode, self.value = top, bottom, mode, value


def padding_of(x: torch.Tensor) -> RowPadding | None:
    return getattr(x, "_row_padding", None)


def keep_padding(bands: Bands, function: Any, before: list[torch.Tensor], after: Any) -> torch.Tensor:
    """Take padding along through an operation that leaves rows as they are; ``before`` are the maps that it joins."""
    name, paddings = function.__name__, [padding_of(x) for x in before]
    alike = all(one and vars(one) == vars(paddings[0]) for one in paddings)
    moved = name in MOVES and isinstance(after, torch.Tensor)
    if not moved or not alike or any(after.shape[-2:] != x.shape[-2:] for x in before):
        raise ValueError(f"{bands.owner}: {name} behind a padding of rows is not supported")
    after._row_padding = paddings[0]
    return after


def pad(
    bands: Bands,
    deferral: Deferral | None,
    x: torch.Tensor,
    pad: Any,
    mode: str = "constant",
    value: float | None = None,
) -> torch.Tensor:
    """Pads the other dimensions at once, and leaves the rows to the convolution behind."""
    if not bands.holds_map(x) and not padding_of(x):
        return F.pad(*computed((x, pad, mode, value)))
    pad = list(pad) + [0] * (4 - len(pad))
    place = slice(2, 4) if bands.dim == -2 else slice(0, 2)
    top, bottom = pad[place]
    pad[place] = 0, 0
    before = padding_of(x)
    if top < 0 or bottom < 0 or (before and (top or bottom)):
        raise ValueError(
            f"{bands.owner}: padding rows twice, or cropping them (by {top} and {bottom}), is not supported"
        )
    if before and (before.mode, mode) == ("constant", "constant") and before.value != (value or 0.0) and any(pad):
        raise ValueError(f"{bands.owner}: padding of two dimensions with different values is not supported")
    if mode == "circular" and (top or bottom):
        raise ValueError(f"{bands.owner}: padding of rows with mode='circular' is not supported")
    if mode != "constant":  # takes as many entries as there are spatial dimensions
        pad = (pad + [0] * 6)[: 2 * (x.dim() - 2)]
    if deferral:
        x = deferral.defer(deferral.map_of(x, "pad"))
        x = deferral.pointwise(F.pad, (x, pad, mode, value), {}) if any(pad) else x
    else:
        x = F.pad(x, pad, mode, value) if any(pad) else x.view_as(x)
    if top or bottom:
        x._row_padding = RowPadding(top, bottom, mode, value or 0.0)
    elif before:
        x._row_padding = before
    return x


def convolution(
    bands: Bands,
    deferral: Deferral | None,
    function: Any,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    """``conv2d`` or ``conv3d``. A rank computes the output rows whose stride falls into its band."""
    spatial = weight.dim() - 2
    stride, dilation = _each(stride, spatial), _each(dilation, spatial)
    step, reach = stride[bands.dim], dilation[bands.dim] * (weight.shape[bands.dim] - 1)
    if padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    padding = [0] * spatial if padding == "valid" else _each(padding, spatial)
    deferred = padding_of(x) or RowPadding(0, 0, "constant", 0.0)
    padding_rows = padding[bands.dim]
    top, bottom = deferred.top + padding_rows, deferred.bottom + padding_rows
    if padding_rows and (deferred.mode != "constant" or deferred.value):
        raise ValueError(f"{bands.owner}: padding rows by a pad and by a convolution is not supported")

    source = deferral.map_of(x, function.__name__) if deferral else None
    sizes = source.sizes if source else bands.sizes(x.shape[bands.dim], function.__name__)
    height = sum(sizes)
    outputs = _output_rows(sizes, step, (height + top + bottom - reach - 1) // step + 1)

    def need(rows: range) -> range:
        return range(rows.start * step - top, (rows.stop - 1) * step - top + reach + 1)

    def inside(rows: range) -> range:
        """Rows of the map that output rows are computed from: one at least, and those that a padding copies."""
        needed = need(rows)
        above, below = max(0, -needed.start), max(0, needed.stop - height)
        start, stop = max(0, needed.start), min(height, needed.stop)
        if deferred.mode == "reflect":
            start = min(start, height - 1 - below) if below else start
            stop = max(stop, above + 1) if above else stop
        start = max(0, min(start, height - 1))
        return range(start, min(height, max(stop, start + 1)))

    if not all(outputs) or height + top + bottom <= reach:
        raise ValueError(f"{bands.owner}: {height} rows are too few for {bands.ranks} ranks: some would have none left")

    def compute(x: torch.Tensor, row_padding: int = 0) -> torch.Tensor:
        paddings = list(padding)
        paddings[bands.dim] = row_padding
        return function(x, weight, bias, tuple(stride), tuple(paddings), tuple(dilation), groups)

    def compute_rows(rows: range, parts: list[torch.Tensor]) -> torch.Tensor:
        needed, own = need(rows), inside(rows)
        return compute(_pad_rows(bands.dim, parts[0], needed, own, height, deferred))

    count = len(outputs[bands.rank])
    if source:
        shape = _output_shape(x, weight, stride, padding, dilation)
        shape[bands.dim] = count
        example = torch.empty(shape, dtype=x.dtype, device="meta")
        workspace = x.nbytes * weight[0, 0].numel()
        sizes = [len(one) for one in outputs]
        result = deferral.defer(Map(sizes, example, x.device, [source], inside, compute_rows, workspace))
    elif step == 1 and top == bottom == padding_rows and 2 * top == reach and min(sizes) > reach:
        result = _from_the_middle(bands, compute, x, sizes, [inside(one) for one in outputs], top)
    else:
        lent = bands.with_halo(x, sizes, [inside(one) for one in outputs])
        result = compute_rows(outputs[bands.rank], [lent])
    bands.now([len(one) for one in outputs], result)
    return result


def _from_the_middle(
    bands: Bands, compute: Any, x: torch.Tensor, sizes: list[int], inside: list[range], reach: int
) -> torch.Tensor:
    """The convolution that keeps the height: of the band itself, without a copy, then again for the rows at its edges.

    The first and the last ``reach`` rows lack what other ranks hold; they are computed from thin bands.
    """
    dim, height = bands.dim, x.shape[bands.dim]
    own = share(sizes, bands.rank)
    above, below = bands.borrow(lambda rows: x.narrow(dim, rows.start - own.start, len(rows)), x, sizes, inside)
    result = compute(x, reach)
    for halo, at_top in ((above, True), (below, False)):
        if halo is None:
            continue
        edge = x.narrow(dim, 0 if at_top else height - 2 * reach, 2 * reach)
        edge = compute(torch.cat([halo, edge] if at_top else [edge, halo], dim=dim))
        result.narrow(dim, 0 if at_top else height - reach, reach).copy_(edge)
    return result


def _output_shape(x: torch.Tensor, weight: torch.Tensor, stride: Any, padding: Any, dilation: Any) -> list[int]:
    each = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return [x.shape[0], weight.shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in each)]


def _output_rows(sizes: list[int], step: int, count: int) -> list[range]:
    """The output rows of each rank, of ``count`` in all."""
    edges = [-(-share(sizes, rank).start // step) for rank in range(len(sizes))] + [count]
    edges = [min(edge, count) for edge in edges]
    return [range(a, b) for a, b in pairwise(edges)]


def _pad_rows(dim: int, x: torch.Tensor, needed: range, held: range, height: int, padding: RowPadding) -> torch.Tensor:
    """Rows ``needed`` of a map of ``height`` rows, from 0 on, where ``x`` are rows ``held`` and others padding."""
    if needed == held:
        return x
    above, below = max(0, -needed.start), max(0, needed.stop - height)
    if above or below:
        entries = [above, below, 0, 0] if dim == -1 else [0, 0, above, below]
        if padding.mode == "constant":
            x = F.pad(x, entries, value=padding.value)
        else:
            x = F.pad(x, entries + [0] * (2 * (x.dim() - 4)), mode=padding.mode)
    return x.narrow(dim, needed.start - (held.start - above), len(needed))


def group_norm(
    bands: Bands,
    deferral: Deferral | None,
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """``group_norm`` by the moments of all bands, joined as by Chan, Golub and LeVeque (1979)."""
    batch, channels = x.shape[:2]
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype

    def own_moments(part: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What is normal by the part's own moments; and these: pixels, means, variances with eps in them."""
        pixels = part.numel() // (batch * channels)
        normal, mean, rstd = torch.native_group_norm(
            part.to(dtype).contiguous(), None, None, batch, channels, pixels, num_groups, eps
        )
        pixels = mean.new_full((1,), pixels, dtype=torch.float64)
        return normal, torch.cat([pixels, mean.double().reshape(-1), rstd.double().square().reciprocal().reshape(-1)])

    if deferral and (isinstance(x, DeferredMap) or x.dim() >= 4):
        source = deferral.map_of(x, "group_norm")
        moments = join_moments(torch.stack([own_moments(part)[1] for part in deferral.parts(source)]))
    else:
        source = None
        normal, moments = own_moments(x)
    whole = bands.joined(moments, eps)
    (mean, variance), (whole_mean, whole_variance) = (
        one[1:].view(2, batch, num_groups).repeat_interleave(channels // num_groups, dim=2) for one in (moments, whole)
    )
    scale, shift = whole_variance.rsqrt(), torch.zeros_like(mean)
    if source is None:  # from what is normal by this band's moments to what is normal by those of all
        shift, scale = (mean - whole_mean) * scale, variance.sqrt() * scale
    if weight is not None:
        scale, shift = scale * weight.double(), shift * weight.double()
    if bias is not None:
        shift = shift + bias.double()
    shape = [batch, channels] + [1] * (x.dim() - 2)
    scale, shift, whole_mean = (one.to(dtype).view(shape) for one in (scale, shift, whole_mean))
    if source is None:
        return torch.addcmul(shift, normal, scale, out=normal.view_as(x)).to(x.dtype)

    def compute(rows: range, parts: list[torch.Tensor]) -> torch.Tensor:
        return (parts[0].to(dtype) - whole_mean).mul_(scale).add_(shift).to(x_dtype)

    x_dtype = x.dtype
    return deferral.defer(Map(source.sizes, source.like, source.device, [source], same_rows, compute))


def pooling(
    bands: Bands,
    function: Any,
    x: torch.Tensor,
    kernel_size: Any,
    stride: Any = None,
    padding: Any = 0,
    *args: Any,
    **kwargs: Any,
) -> torch.Tensor:
    """``avg_pool2d`` and its like, of windows that lie side by side, none of them on two bands."""
    name = function.__name__
    values = (kernel_size, stride or kernel_size, padding, kwargs.get("dilation", 1))
    kernel, step, padded, dilation = (_each(value, 3 if "3d" in name else 2)[bands.dim] for value in values)
    sizes = bands.sizes(x.shape[bands.dim], name)
    if kernel != step or padded or dilation > 1 or any(size % step for size in sizes):
        raise ValueError(f"{bands.owner}: {name} of windows that lie on two bands is not supported")
    result = function(x, kernel_size, stride, padding, *args, **kwargs)
    bands.now([size // step for size in sizes], result)
    return result


def attention(
    bands: Bands,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    **options: Any,
) -> torch.Tensor:
    """``scaled_dot_product_attention`` of this band's tokens to those of all, ``[..., S, D]``.

    Tokens are pixels, of one frame or of several, one after the other; attention over the frames of one pixel needs no
    other rank. A mask may tell frames apart, not pixels.
    """
    height, width = bands.area
    tokens, pixels, sizes = key.shape[-2], height * width, bands.sizes(height, "attention")
    if tokens in (bands.frames, pixels) and bands.frames in [size * width for size in sizes]:
        raise ValueError(
            f"{bands.owner}: attention over as many frames as a band has pixels, {bands.frames}, is ambiguous"
        )
    if tokens == bands.frames or tokens % pixels:
        if query.shape[0] % pixels:
            raise ValueError(f"{bands.owner}: attention over {tokens} tokens of {pixels} pixels is not supported")
        return SDPA(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if is_causal:
        raise ValueError(f"{bands.owner}: causal attention over pixels is not supported")
    frames = tokens // pixels
    if attn_mask is not None:
        firsts = torch.arange(frames, device=key.device) * pixels
        if not torch.equal(attn_mask, attn_mask[..., firsts.repeat_interleave(pixels)]):
            raise ValueError(f"{bands.owner}: an attention mask that tells pixels apart is not supported")
        attn_mask = attn_mask[..., torch.cat([firsts.repeat_interleave(size * width) for size in sizes])]
    key, value = gather_together(key, value, key.dim() - 2, [frames * size * width for size in sizes], bands.group)
    return SDPA(query, key, value, attn_mask, dropout_p, **options)


def matmul(bands: Bands, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``matmul`` in linear attention: over all pixels, summed over the bands, or of each pixel.

    Sums over pixels are of keys and values, as in Sana's autoencoder (arXiv 2410.10733).
    """
    pixels = bands.area[0] * bands.area[1]
    (m, k), n = a.shape[-2:], b.shape[-1]
    if k == pixels and pixels not in (m, n):
        product = torch.matmul(a, b).contiguous()
        dist.all_reduce(product, group=bands.group)
        return product
    if pixels not in (n, m) or k == pixels or m == n:
        raise ValueError(
            f"{bands.owner}: a product of {tuple(a.shape)} and {tuple(b.shape)} over bands of {pixels} pixels is not"
            " known here; the picture may be too small for so many ranks"
        )
    return torch.matmul(a, b)


def _each(value: Any, spatial: int) -> list[int]:
    return [value] * spatial if isinstance(value, int) else list(value) * (spatial if len(value) == 1 else 1)
