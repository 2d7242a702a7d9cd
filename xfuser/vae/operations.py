"""Operations that mix rows, implemented on bands."""

from itertools import pairwise
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from xfuser.core.distributed.group_coordinator import gather_together
from xfuser.core.distributed.utils import share
from xfuser.vae.bands import Bands, Piece, join_moments
from xfuser.vae.deferred import Deferral, DeferredMap, Map, computed
from xfuser.vae.functions import KEEPING

SDPA = F.scaled_dot_product_attention  # the original: a wrapped call replaces it in torch


class RowPadding(NamedTuple):
    """Requested padding of the full map's rows, which the next convolution will apply."""

    top: int = 0
    bottom: int = 0
    mode: str = "constant"
    value: float = 0.0


def padding_of(x: Tensor) -> RowPadding | None:
    """The pending row padding of a map; None if it has none."""
    return getattr(x, "_row_padding", None)


def keep_padding(bands: Bands, function: Any, before: list[Tensor], after: Any) -> Tensor:
    """Pass pending padding on to the result of an operation that keeps rows; ``before`` are its input maps."""
    name, paddings = function.__name__, {padding_of(x) for x in before}
    keeps = name in KEEPING and isinstance(after, Tensor) and all(after.shape[-2:] == x.shape[-2:] for x in before)
    if not keeps or len(paddings) > 1:
        raise bands.refusal(f"{name} after a padding of rows is not supported")
    (after._row_padding,) = paddings
    return after


class Window(NamedTuple):
    """The input rows that a convolution's output rows are computed from, counted from the full map's top."""

    height: int  # rows of the full input
    step: int  # stride: input rows from one output row to the next
    reach: int  # input rows needed after an output row's first one
    padding: RowPadding

    @property
    def keeps_height(self) -> bool:
        """Whether the output has as many rows as the input, with equal padding above and below."""
        return self.step == 1 and 2 * self.padding.top == 2 * self.padding.bottom == self.reach

    def outputs(self, sizes: list[int]) -> list[range]:
        """The output rows of each rank: those whose first input row is in its band."""
        count = (self.height + self.padding.top + self.padding.bottom - self.reach - 1) // self.step + 1
        edges = [-(-share(sizes, rank).start // self.step) for rank in range(len(sizes))] + [count]
        return [range(a, b) for a, b in pairwise(min(edge, count) for edge in edges)]

    def needs(self, rows: range) -> range:
        """The input rows of these output rows; rows outside the map are padding."""
        first = rows.start * self.step - self.padding.top
        return range(first, first + (len(rows) - 1) * self.step + self.reach + 1)

    def outside(self, rows: range) -> tuple[int, int]:
        """The number of these input rows above the map, and the number below it."""
        return max(0, -rows.start), max(0, rows.stop - self.height)

    def inside(self, rows: range) -> range:
        """The input rows within the map, at least one, including rows that padding copies."""
        needed = self.needs(rows)
        above, below = self.outside(needed)
        start, stop = max(0, needed.start), min(self.height, needed.stop)
        if self.padding.mode == "reflect":
            start = min(start, self.height - 1 - below) if below else start
            stop = max(stop, above + 1) if above else stop
        start = max(0, min(start, self.height - 1))
        return range(start, min(self.height, max(stop, start + 1)))

    def padded(self, x: Tensor, dim: int, rows: range) -> Tensor:
        """The input rows of these output rows, padded from the rows inside the map."""
        needed, held = self.needs(rows), self.inside(rows)
        above, below = self.outside(needed)
        if above or below:
            entries = [above, below, 0, 0] if dim == -1 else [0, 0, above, below]
            if self.padding.mode == "constant":
                x = F.pad(x, entries, value=self.padding.value)
            else:
                x = F.pad(x, entries + [0] * (2 * (x.dim() - 4)), mode=self.padding.mode)
        return x.narrow(dim, needed.start - (held.start - above), len(needed))


class Operations:
    """Operations on bands, with the signatures of their namesakes in ``torch.nn.functional``.

    Args:
        deferral: records operations to compute them later; None to compute all of them at once.
    """

    def __init__(self, bands: Bands, deferral: Deferral | None) -> None:
        self._bands, self._deferral = bands, deferral

    def pad(self, x: Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> Tensor:
        """Pad the other dimensions at once, and leave the rows to the next convolution."""
        bands, deferral, before = self._bands, self._deferral, padding_of(x)
        if not bands.holds_map(x) and not before:
            return F.pad(*computed((x, pad, mode, value)))
        pad = list(pad) + [0] * (4 - len(pad))
        place = slice(2, 4) if bands.dim == -2 else slice(0, 2)
        rows = RowPadding(*pad[place], mode, value or 0.0)
        pad[place] = 0, 0
        pads_rows, pads_others = bool(rows.top or rows.bottom), any(pad)
        if rows.top < 0 or rows.bottom < 0 or (before and pads_rows):
            raise bands.refusal(f"padding rows twice, or cropping them ({rows.top}, {rows.bottom}), is not supported")
        if before and before.mode == mode == "constant" and before.value != rows.value and pads_others:
            raise bands.refusal("padding of two dimensions with different values is not supported")
        if mode == "circular" and pads_rows:
            raise bands.refusal("padding of rows with mode='circular' is not supported")
        if mode != "constant":  # these modes require entries for all spatial dimensions
            pad = (pad + [0] * 6)[: 2 * (x.dim() - 2)]
        if deferral:
            x = deferral.defer(deferral.map_of(x, "pad"))
            x = deferral.pointwise(F.pad, (x, pad, mode, value), {}) if pads_others else x
        else:
            x = F.pad(x, pad, mode, value) if pads_others else x.view_as(x)
        if pads_rows or before:
            x._row_padding = before or rows
        return x

    def convolution(
        self, function: Any, x: Tensor, weight: Tensor, bias=None, stride=1, padding=0, dilation=1, groups=1
    ) -> Tensor:
        """``conv2d`` or ``conv3d``. Each rank computes the output rows whose first input row is in its band."""
        bands, deferral, dim, spatial = self._bands, self._deferral, self._bands.dim, weight.dim() - 2
        stride, dilation = _each(stride, spatial), _each(dilation, spatial)
        if padding == "same":
            padding = [d * (k - 1) // 2 for d, k in zip(dilation, weight.shape[2:], strict=True)]
        padding = [0] * spatial if padding == "valid" else _each(padding, spatial)
        source = deferral.map_of(x, function.__name__) if deferral else None
        sizes = source.sizes if source else bands.sizes(x.shape[dim], function.__name__)
        reach = dilation[dim] * (weight.shape[dim] - 1)
        window = _window(bands, sizes, stride[dim], reach, padding[dim], padding_of(x))
        outputs = window.outputs(sizes)
        after, inside = [len(rows) for rows in outputs], [window.inside(rows) for rows in outputs]

        def compute(x: Tensor, row_padding: int = 0) -> Tensor:
            paddings = (*padding[:dim], row_padding, *padding[dim:][1:])
            return function(x, weight, bias, tuple(stride), paddings, tuple(dilation), groups)

        def compute_rows(rows: range, parts: list[Tensor]) -> Tensor:
            return compute(window.padded(parts[0], dim, rows))

        if source:
            shape = _output_shape(x, weight, stride, padding, dilation)
            shape[dim] = after[bands.rank]
            like, workspace = torch.empty(shape, dtype=x.dtype, device="meta"), x.nbytes * weight[0, 0].numel()
            result = deferral.defer(Map(after, like, x.device, [source], window.inside, compute_rows, workspace))
        else:
            band = bands.piece(x, sizes)
            halo = bands.halo([band], sizes, inside)
            if window.keeps_height and window.padding.top == padding[dim] and reach < min(sizes):
                result = _from_the_middle(bands, compute, band, halo, padding[dim])
            else:
                result = compute_rows(outputs[bands.rank], [bands.cut([band, *halo], inside[bands.rank])])
        bands.now(after, result)
        return result

    def group_norm(self, x: Tensor, num_groups: int, weight=None, bias=None, eps: float = 1e-5) -> Tensor:
        """``group_norm`` by the moments of all bands, combined as in Chan, Golub and LeVeque (1979)."""
        batch, channels = x.shape[:2]
        dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
        source = None
        if self._deferral and (isinstance(x, DeferredMap) or x.dim() >= 4):
            source = self._deferral.map_of(x, "group_norm")
            parts = (_by_own_moments(part.to(dtype), num_groups, eps)[1] for part in self._deferral.parts(source))
            moments = join_moments(torch.stack(list(parts)))
        else:
            normal, moments = _by_own_moments(x.to(dtype), num_groups, eps)
        of_channels = torch.stack([moments, self._bands.joined(moments, eps)])[:, 1:].view(2, 2, batch, num_groups)
        (mean, variance), (full_mean, full_variance) = of_channels.repeat_interleave(channels // num_groups, dim=3)
        scale, shift = full_variance.rsqrt(), torch.zeros_like(mean)
        if source is None:  # from normalization by this band's moments to that by all bands'
            shift, scale = (mean - full_mean) * scale, variance.sqrt() * scale
        if weight is not None:
            scale, shift = scale * weight.double(), shift * weight.double()
        if bias is not None:
            shift = shift + bias.double()
        shape = [batch, channels] + [1] * (x.dim() - 2)
        scale, shift, full_mean = (one.to(dtype).view(shape) for one in (scale, shift, full_mean))
        if source is None:
            return torch.addcmul(shift, normal, scale, out=normal.view_as(x)).to(x.dtype)

        def compute(_: range, parts: list[Tensor]) -> Tensor:
            return (parts[0].to(dtype) - full_mean).mul_(scale).add_(shift).to(source.like.dtype)

        return self._deferral.defer(Map(source.sizes, source.like, source.device, [source], compute=compute))

    def pooling(self, function: Any, x: Tensor, kernel_size, stride=None, padding=0, *args, **kwargs) -> Tensor:
        """``avg_pool2d`` and similar, for adjacent windows, each within one band."""
        name, dim = function.__name__, self._bands.dim
        values = (kernel_size, stride or kernel_size, padding, kwargs.get("dilation", 1))
        kernel, step, padded, dilation = (_each(value, 3 if "3d" in name else 2)[dim] for value in values)
        sizes = self._bands.sizes(x.shape[dim], name)
        if kernel != step or padded or dilation > 1 or any(size % step for size in sizes):
            raise self._bands.refusal(f"{name} of windows across two bands is not supported")
        result = function(x, kernel_size, stride, padding, *args, **kwargs)
        self._bands.now([size // step for size in sizes], result)
        return result

    def attention(
        self, query: Tensor, key: Tensor, value: Tensor, attn_mask=None, dropout_p=0.0, is_causal=False, **options
    ) -> Tensor:
        """``scaled_dot_product_attention`` from this band's tokens to all bands' tokens, ``[..., S, D]``.

        Tokens are the pixels of one frame or of several frames in order; attention over the frames of one pixel needs
        no other rank. A mask may differ between frames, not between pixels.
        """
        bands, (height, width) = self._bands, self._bands.area
        tokens, pixels, sizes = key.shape[-2], height * width, bands.sizes(height, "attention")
        if tokens in (bands.frames, pixels) and bands.frames in [size * width for size in sizes]:
            raise bands.refusal(f"attention over as many frames as a band has pixels, {bands.frames}, is ambiguous")
        if tokens == bands.frames or tokens % pixels:
            if query.shape[0] % pixels:
                raise bands.refusal(f"attention over {tokens} tokens of {pixels} pixels is not supported")
            return SDPA(query, key, value, attn_mask, dropout_p, is_causal, **options)
        if is_causal:
            raise bands.refusal("causal attention over pixels is not supported")
        frames = tokens // pixels
        if attn_mask is not None:
            firsts = torch.arange(frames, device=key.device) * pixels
            if not torch.equal(attn_mask, attn_mask[..., firsts.repeat_interleave(pixels)]):
                raise bands.refusal("an attention mask that differs between pixels is not supported")
            attn_mask = attn_mask[..., torch.cat([firsts.repeat_interleave(size * width) for size in sizes])]
        key, value = gather_together(key, value, key.dim() - 2, [frames * size * width for size in sizes], bands.group)
        return SDPA(query, key, value, attn_mask, dropout_p, **options)

    def matmul(self, a: Tensor, b: Tensor) -> Tensor:
        """``matmul`` in linear attention: over all pixels, with a sum over the bands, or for each pixel.

        Sums over pixels are products of keys and values, as in Sana's autoencoder (arXiv 2410.10733).
        """
        height, width = self._bands.area
        pixels = height * width
        (m, k), n = a.shape[-2:], b.shape[-1]
        if k == pixels and pixels not in (m, n):
            product = torch.matmul(a, b).contiguous()
            dist.all_reduce(product, group=self._bands.group)
            return product
        if pixels not in (n, m) or k == pixels or m == n:
            shapes = f"{tuple(a.shape)} and {tuple(b.shape)}"
            raise self._bands.refusal(f"a product of {shapes} over bands of {pixels} pixels is not supported")
        return torch.matmul(a, b)


def _window(bands: Bands, sizes: list[int], step: int, reach: int, own: int, before: RowPadding | None) -> Window:
    """The window of a convolution that pads ``own`` rows with zeros, after the pending padding ``before``."""
    before = before or RowPadding()
    if own and (before.mode != "constant" or before.value):
        raise bands.refusal("padding rows by a pad and by a convolution is not supported")
    padding = before._replace(top=before.top + own, bottom=before.bottom + own)
    window = Window(sum(sizes), step, reach, padding)
    if not all(window.outputs(sizes)):
        raise bands.refusal(f"{window.height} rows are too few for {bands.ranks} ranks: some ranks would have none")
    return window


def _from_the_middle(bands: Bands, compute: Any, band: Piece, halo: list[Piece], reach: int) -> Tensor:
    """A convolution that keeps the height: convolve the band without a copy, then recompute the rows at its edges.

    The first and last ``reach`` rows need rows of other ranks; they are computed from thin bands with the halo.
    """
    (first, x), dim = band, bands.dim
    height, result = x.shape[dim], compute(x, reach)
    for start, rows in halo:
        above = start < first
        edge = x.narrow(dim, 0 if above else height - 2 * reach, 2 * reach)
        edge = compute(torch.cat([rows, edge] if above else [edge, rows], dim=dim))
        result.narrow(dim, 0 if above else height - reach, reach).copy_(edge)
    return result


def _output_shape(x: Tensor, weight: Tensor, stride: Any, padding: Any, dilation: Any) -> list[int]:
    each = zip(x.shape[2:], weight.shape[2:], stride, padding, dilation, strict=True)
    return [x.shape[0], weight.shape[0], *((n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in each)]


def _by_own_moments(x: Tensor, num_groups: int, eps: float) -> tuple[Tensor, Tensor]:
    """A part normalized by its own moments, and the moments in float64: pixels, means, variances plus eps."""
    pixels = x[0, 0].numel()
    normal, mean, rstd = torch.native_group_norm(x.contiguous(), None, None, *x.shape[:2], pixels, num_groups, eps)
    mean, rstd = mean.double().reshape(-1), rstd.double().reshape(-1)
    return normal, torch.cat([mean.new_full((1,), pixels), mean, rstd.square().reciprocal()])


def _each(value: Any, spatial: int) -> list[int]:
    return [value] * spatial if isinstance(value, int) else list(value) * (spatial if len(value) == 1 else 1)
