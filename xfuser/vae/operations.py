"""The operations that mix rows, on bands: each takes what its namesake in ``torch.nn.functional`` takes."""

from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from xfuser.core import device as devices
from xfuser.core.distributed.group_coordinator import gather_together
from xfuser.core.distributed.utils import share
from xfuser.vae.bands import Bands


class RowPadding:
    """Padding of the whole map's first and last rows that has been asked for, and is left to the convolution behind."""

    def __init__(self, top: int, bottom: int, mode: str, value: float) -> None:
        self.top, self.bottom, self.mode, self.value = top, bottom, mode, value


def padding_of(x: torch.Tensor) -> RowPadding | None:
    return getattr(x, "_row_padding", None)


def keep_padding(function: Any, before: torch.Tensor, after: torch.Tensor) -> torch.Tensor:
    """Take padding along through an operation that leaves values and maps as they are."""
    moves = ("contiguous", "flatten", "permute", "reshape", "squeeze", "to", "transpose", "unsqueeze", "view")
    if function.__name__ not in moves or after.shape[-2:] != before.shape[-2:]:
        raise ValueError(f"parallel VAE: {function.__name__} behind a padding of rows is not known here")
    after._row_padding = padding_of(before)
    return after


def pad(bands: Bands, x: torch.Tensor, pad: Any, mode: str = "constant", value: float | None = None) -> torch.Tensor:
    """Pads the other dimensions at once, and leaves the rows to the convolution behind."""
    if not bands.holds_map(x):
        return F.pad(x, pad, mode, value)
    pad = list(pad) + [0] * (4 - len(pad))
    place = slice(2, 4) if bands.dim == -2 else slice(0, 2)
    top, bottom = pad[place]
    pad[place] = 0, 0
    before = padding_of(x)
    if top < 0 or bottom < 0 or (before and (top or bottom)):
        raise ValueError(f"parallel VAE: rows are padded twice, or cropped (by {top} and {bottom}): not known here")
    if mode != "constant":  # takes as many entries as there are spatial dimensions
        pad = (pad + [0] * 6)[: 2 * (x.dim() - 2)]
    x = F.pad(x, pad, mode=mode, value=value) if any(pad) else x.view_as(x)
    if top or bottom:
        x._row_padding = RowPadding(top, bottom, mode, value or 0.0)
    elif before:
        x._row_padding = before
    return x


def convolution(
    bands: Bands,
    function: Any,
    chunk_rows: int | str | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> torch.Tensor:
    """``conv2d`` or ``conv3d``. A rank computes the output rows whose stride falls into its band.

    With ``chunk_rows``, as many output rows at a time: the same result with a smaller workspace.
    """
    spatial = weight.dim() - 2
    stride, dilation = _each(stride, spatial), _each(dilation, spatial)
    step, reach = stride[bands.dim], dilation[bands.dim] * (weight.shape[bands.dim] - 1)
    if padding == "same":
        padding = [d * (k - 1) // 2 for d, k in zip(dilation, weight.shape[2:], strict=True)]
    padding = [0] * spatial if padding == "valid" else _each(padding, spatial)
    deferred = padding_of(x) or RowPadding(0, 0, "constant", 0.0)
    top, bottom = deferred.top + padding[bands.dim], deferred.bottom + padding[bands.dim]
    if padding[bands.dim] and (deferred.mode != "constant" or deferred.value):
        raise ValueError("parallel VAE: rows are padded in two ways, by a pad and by a convolution: not known here")
    padding_rows = padding[bands.dim]

    sizes = bands.sizes(x.shape[bands.dim], function.__name__)
    height = sum(sizes)
    outputs = _output_rows(sizes, step, (height + top + bottom - reach - 1) // step + 1)
    needs = [range(o.start * step - top, (o.stop - 1) * step - top + reach + 1) for o in outputs]
    inside = [range(max(0, min(one.start, height)), max(0, min(one.stop, height))) for one in needs]
    if not all(outputs) or not all(inside):
        raise ValueError(f"parallel VAE: {height} rows are too few for {bands.ranks} ranks: some would have none left")
    keeps_height = step == 1 and top == bottom == padding_rows and 2 * top == reach
    count = len(outputs[bands.rank])

    def compute(rows: torch.Tensor, row_padding: int = 0) -> torch.Tensor:
        padding[bands.dim] = row_padding
        return function(rows, weight, bias, tuple(stride), tuple(padding), tuple(dilation), groups)

    if keeps_height and not chunk_rows and min(sizes) > reach:
        result = _from_the_middle(bands, compute, x, sizes, inside, top)
    else:
        lent = bands.with_halo(x, sizes, inside)
        need, own = needs[bands.rank], inside[bands.rank]
        if own != need:
            lent = _pad_rows(bands.dim, lent, own.start - need.start, need.stop - own.stop, deferred)
        if chunk_rows == "auto":
            chunk_rows = _affordable_rows(x.narrow(bands.dim, 0, 1), weight)
        result = _in_chunks(bands.dim, compute, lent, count, chunk_rows or count, step, reach)
    bands.now([len(one) for one in outputs], result)
    return result


def _from_the_middle(
    bands: Bands, compute: Any, x: torch.Tensor, sizes: list[int], inside: list[range], reach: int
) -> torch.Tensor:
    """The convolution that keeps the height: of the band itself, without a copy, then again for the rows at its edges.

    The first and the last ``reach`` rows lack what other ranks hold; they are computed from thin bands.
    """
    dim, height = bands.dim, x.shape[bands.dim]
    above, below = bands.borrow(x, sizes, inside)
    result = compute(x, reach)
    for halo, at_top in ((above, True), (below, False)):
        if halo is None:
            continue
        edge = x.narrow(dim, 0 if at_top else height - 2 * reach, 2 * reach)
        edge = compute(torch.cat([halo, edge] if at_top else [edge, halo], dim=dim))
        result.narrow(dim, 0 if at_top else height - reach, reach).copy_(edge)
    return result


def _in_chunks(dim: int, compute: Any, x: torch.Tensor, count: int, chunk: int, step: int, reach: int) -> torch.Tensor:
    """``count`` output rows, ``chunk`` of them at a time."""
    if count <= chunk:
        return compute(x)
    result = None
    for start in range(0, count, chunk):
        rows = min(chunk, count - start)
        part = compute(x.narrow(dim, start * step, (rows - 1) * step + reach + 1))
        if result is None:
            shape = list(part.shape)
            shape[dim] = count
            result = part.new_empty(shape)
        result.narrow(dim, start, rows).copy_(part)
    return result


def _affordable_rows(row: torch.Tensor, weight: torch.Tensor) -> int:
    """Output rows whose inputs, written out once for each place in the kernel, take a quarter of the free memory."""
    needed = row.numel() * weight[0, 0].numel() * row.element_size()
    return max(1, int(devices.free_memory() // (4 * needed)))


def _output_rows(sizes: list[int], step: int, count: int) -> list[range]:
    """The output rows of each rank, of ``count`` in all."""
    edges = [-(-share(sizes, rank).start // step) for rank in range(len(sizes))] + [count]
    edges = [min(edge, count) for edge in edges]
    return [range(a, b) for a, b in pairwise(edges)]


def _pad_rows(dim: int, x: torch.Tensor, above: int, below: int, padding: RowPadding) -> torch.Tensor:
    entries = [above, below, 0, 0] if dim == -1 else [0, 0, above, below]
    if padding.mode == "constant":
        return F.pad(x, entries, value=padding.value)
    return F.pad(x, entries + [0] * (2 * (x.dim() - 4)), mode=padding.mode)


def group_norm(
    bands: Bands,
    x: torch.Tensor,
    num_groups: int,
    weight: torch.Tensor | None = None,
    bias: torch.Tensor | None = None,
    eps: float = 1e-5,
) -> torch.Tensor:
    """``group_norm`` by the moments of all bands, joined as by Chan, Golub and LeVeque (1979)."""
    batch, channels = x.shape[:2]
    pixels = x.numel() // (batch * channels)
    dtype = torch.float32 if x.dtype in (torch.float16, torch.bfloat16) else x.dtype
    normal, mean, rstd = torch.native_group_norm(
        x.to(dtype).contiguous(), None, None, batch, channels, pixels, num_groups, eps
    )
    mean, rstd = mean.double(), rstd.double()
    told = torch.cat([mean.reshape(-1), rstd.square().reciprocal().reshape(-1), mean.new_tensor([pixels])])
    parts = bands.gather(told.unsqueeze(0), [1] * bands.ranks, 0)
    means, variances = (part.view(-1, batch, num_groups) for part in parts[:, :-1].chunk(2, dim=1))
    shares = (parts[:, -1] / parts[:, -1].sum()).view(-1, 1, 1)
    whole = (means * shares).sum(0)
    whole_rstd = ((variances + (means - whole).square()) * shares).sum(0).rsqrt()  # eps is in the variances
    # From what is normal by this band's moments to what is normal by those of all.
    scale, shift = whole_rstd / rstd, (mean - whole) * whole_rstd
    scale, shift = (one.repeat_interleave(channels // num_groups, dim=1) for one in (scale, shift))
    if weight is not None:
        scale, shift = scale * weight.double(), shift * weight.double()
    if bias is not None:
        shift = shift + bias.double()
    shape = [batch, channels] + [1] * (x.dim() - 2)
    scale, shift = (one.to(normal.dtype).view(shape) for one in (scale, shift))
    return torch.addcmul(shift, normal, scale, out=normal.view_as(x)).to(x.dtype)


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
    """``scaled_dot_product_attention`` of this band's tokens to those of all, ``[B, H, S, D]``.

    Tokens are pixels, of one frame or of several, one after the other; attention over the frames of one pixel needs no
    other rank. A mask may tell frames apart, not pixels.
    """
    height, width = bands.area
    tokens, pixels = key.shape[2], height * width
    if tokens % pixels:
        if query.shape[0] % pixels:
            raise ValueError(f"parallel VAE: attention over {tokens} tokens of {pixels} pixels is not known here")
        return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, is_causal, **options)
    if is_causal:
        raise ValueError("parallel VAE: causal attention over pixels is not known here")
    frames, sizes = tokens // pixels, bands.sizes(height, "attention")
    if attn_mask is not None:
        firsts = torch.arange(frames, device=key.device) * pixels
        if not torch.equal(attn_mask, attn_mask[..., firsts.repeat_interleave(pixels)]):
            raise ValueError("parallel VAE: an attention mask that tells pixels apart is not known here")
        attn_mask = attn_mask[..., torch.cat([firsts.repeat_interleave(size * width) for size in sizes])]
    key, value = gather_together(key, value, 2, [frames * size * width for size in sizes], bands.group)
    return F.scaled_dot_product_attention(query, key, value, attn_mask, dropout_p, **options)


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
            f"parallel VAE: a product of {tuple(a.shape)} and {tuple(b.shape)} over bands of {pixels} pixels is not"
            " known here; the picture may be too small for so many ranks"
        )
    return torch.matmul(a, b)


def _each(value: Any, spatial: int) -> list[int]:
    return [value] * spatial if isinstance(value, int) else list(value) * (spatial if len(value) == 1 else 1)
