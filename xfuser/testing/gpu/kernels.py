"""Compare attention kernels on one device, and their LSE, with float64."""

import itertools
from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor

from xfuser.core import device as devices
from xfuser.core.attention.kernels import HALF, KERNELS, attention_math, attention_with_lse
from xfuser.core.attention.ring import merge
from xfuser.testing.gpu.report import Check

HEADS = (32, 33, 40, 64, 72, 128, 160, 192, 256)  # head dimensions
LENGTHS = ((1, 1), (5, 7), (33, 33), (129, 64), (257, 300), (4, 0), (0, 4))  # number of queries and keys
SHORT_HEADS, SHORT_LENGTHS = (33, 64), ((5, 7), (33, 33), (4, 0), (0, 4))
MASKS = (None, "keys", "pairs")
TOLERANCES = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 3e-2}  # for outputs of about 1
LSE_TOLERANCE = 2e-3


def checks(short: bool) -> Iterator[Check]:
    """Yield the checks of each kernel in each dtype, and of the ring's merge with each kernel."""
    device = devices.device(0)
    for name, kernel in KERNELS.items():
        for dtype in (torch.float32, *HALF):
            if missing := kernel.missing():
                break
            if _ever_taken(name, dtype, device):
                title = f"{name}, {dtype}".replace("torch.", "")
                yield Check(f"kernel {name}", title, partial(_compare, name, dtype, device, short))
        dtype = torch.float32 if device.type == "cpu" else torch.bfloat16
        yield Check(f"kernel {name}", f"ring's merge, {name}", partial(_merged, name, dtype, device), missing)


def _ever_taken(name: str, dtype: torch.dtype, device: torch.device) -> bool:
    x = torch.empty(1, 1, 8, 64, dtype=dtype, device=device)
    return KERNELS[name].takes(x, x, x, None)


def _compare(name: str, dtype: torch.dtype, device: torch.device, short: bool) -> str:
    """Return the largest errors of a kernel over all sizes that it supports."""
    worst, worst_lse, ran, others = 0.0, 0.0, 0, 0
    heads, lengths = (SHORT_HEADS, SHORT_LENGTHS) if short else (HEADS, LENGTHS)
    for head, (queries, keys), masked, grouped in itertools.product(heads, lengths, MASKS, (False, True)):
        for causal in (False, True) if queries == keys and masked is None else (False,):
            q, k, v, mask = tensors(head, queries, keys, masked, 2 if grouped else 4, dtype, device)
            taken = KERNELS[name].takes(q, k, v, mask)
            ran, others = ran + taken, others + (not taken)
            found = attention_with_lse(q, k, v, mask, None, name, causal)
            error, lse_error = errors(found, q, k, v, mask, causal)
            place = f"head {head}, {queries} x {keys}, mask {masked}, grouped {grouped}, causal {causal}"
            if error > TOLERANCES[dtype] or lse_error > LSE_TOLERANCE:
                raise AssertionError(f"{place}: output {error:.1e}, LSE {lse_error:.1e}")
            worst, worst_lse = max(worst, error), max(worst_lse, lse_error)
    return f"output {worst:.0e}, LSE {worst_lse:.0e}; {ran} sizes, {others} more by the next kernel"


def tensors(
    head: int, queries: int, keys: int, masked: str | None, kv_heads: int, dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Return q ``[2, 4, Sq, D]``, k and v ``[2, kv_heads, Sk, D]``, and a mask.

    The mask hides some keys; a mask of pairs also hides all keys from the first query.
    """
    generator = torch.Generator().manual_seed(head + queries)

    def draw(heads: int, length: int) -> Tensor:
        return torch.randn(2, heads, length, head, generator=generator).to(device, dtype)

    q, k, v = draw(4, queries), draw(kv_heads, keys), draw(kv_heads, keys)
    if masked is None:
        return q, k, v, None
    shape = (2, 1, 1, keys) if masked == "keys" else (2, 4, queries, keys)
    shown = torch.rand(shape, generator=generator) > 0.3
    shown[:, :, :1] &= masked == "keys"
    return q, k, v, shown.to(device)


def errors(
    found: tuple[Tensor, Tensor], q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool
) -> tuple[float, float]:
    """Return max|a - b| of the output and of the LSE over rows with a visible key; other rows must be 0 and -inf."""
    repeats = q.shape[1] // k.shape[1]
    q, k, v = (x.cpu().double() for x in (q, k.repeat_interleave(repeats, 1), v.repeat_interleave(repeats, 1)))
    scores = q @ k.mT * q.shape[-1] ** -0.5
    if mask is not None:
        scores = scores.masked_fill(~mask.cpu(), -torch.inf)
    if causal:
        scores = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf)
    lse = scores.logsumexp(-1)
    blind = lse == -torch.inf
    out = (scores.softmax(-1).masked_fill(blind.unsqueeze(-1), 0.0) @ v) if k.shape[2] else torch.zeros_like(q)
    own, own_lse = (x.cpu().double() for x in found)
    if not torch.equal(own_lse == -torch.inf, blind):
        raise AssertionError("the LSE of rows without keys is not -inf")
    return _largest(own - out), _largest((own_lse - lse)[~blind])


def _largest(x: Tensor) -> float:
    return x.abs().max().item() if x.numel() else 0.0


def _merged(name: str, dtype: torch.dtype, device: torch.device) -> str:
    """Compare attention to blocks of keys one after the other, as in a ring, with attention to all keys."""
    q, k, v, _ = tensors(64, 33, 300, None, 4, dtype, device)
    out, lse = None, None
    for keys, values in zip(k.split([1, 128, 64, 107], 2), v.split([1, 128, 64, 107], 2), strict=True):
        out, lse = merge(out, lse, *attention_with_lse(q, keys, values, backend=name))
    error, lse_error = errors((out, lse), q, k, v, None, False)
    plain, _ = errors(attention_math(q, k, v, None, None, False), q, k, v, None, False)
    if error > max(2 * plain, TOLERANCES[dtype]) or lse_error > LSE_TOLERANCE:
        raise AssertionError(f"output {error:.1e}, LSE {lse_error:.1e}")
    return f"4 blocks of keys: output {error:.0e}, LSE {lse_error:.0e}"
