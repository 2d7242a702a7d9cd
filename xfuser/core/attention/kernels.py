"""Attention kernels that return the log-sum-exp (LSE), which the ring requires to merge partial results.

Tensors are ``[B, H, S, D]``; the LSE is ``[B, H, Sq]`` in float32, or in float64 for tensors of that dtype. A mask is
additive and ``[B|1, H|1, 1|Sq, Sk]``. Keys and values may have fewer heads than queries (grouped queries).
``causal`` requires as many queries as keys; query i attends to keys up to and including i.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
import torch.nn.functional as F

from xfuser.core import device as devices
from xfuser.core.attention import dispatch, flash_attn
from xfuser.core.logger import logger

aten = torch.ops.aten
Tensor = torch.Tensor
HALF = (torch.float16, torch.bfloat16)
# CUDA architectures. Volta and Turing, which precede Ampere, support neither flash kernels nor bfloat16.
AMPERE, HOPPER, BLACKWELL = (8, 0), (9, 0), (10, 0)
CUDNN_HEAD = 128  # the largest head size that cuDNN supports on every architecture and in every release
MATH_SCORES = 1 << 24  # elements of the score matrix that the math kernel holds at once

Result = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Kernel:
    """A kernel that computes attention with its LSE.

    Attributes:
        missing: why the kernel is not available on this machine; returns None if it is.
        takes: whether it supports these q, k, v, mask.
        run: ``(q, k, v, mask, scale, causal) -> (out, lse)``; a mask excludes ``causal``.
    """

    missing: Callable[[], str | None]
    takes: Callable[..., bool]
    run: Callable[..., Result]


def wide(x: Tensor) -> torch.dtype:
    """The dtype for sums over tensors of ``x``'s dtype: float64 for float64, float32 otherwise."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def attention_math(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool) -> Result:
    """For any device, dtype, head size and mask, in :func:`wide`; chunks of queries bound the score matrix."""
    scale, dtype = q.shape[-1] ** -0.5 if scale is None else scale, wide(q)
    keys, values = k.to(dtype), v.to(dtype)
    rows = max(1, MATH_SCORES // max(1, q.shape[0] * q.shape[1] * k.shape[2]))
    positions = torch.arange(k.shape[2], device=q.device)
    outs, lses = [], []
    for start in range(0, max(1, q.shape[2]), rows):  # one pass even without queries
        scores = (q[:, :, start : start + rows].to(dtype) * scale) @ keys.mT
        if causal:
            later = positions > positions[start : start + rows, None]
            scores = scores.masked_fill(later, -torch.inf)
        if mask is not None:
            scores = scores + (mask if mask.shape[2] == 1 else mask[:, :, start : start + rows]).to(dtype)
        lse = scores.logsumexp(dim=-1)
        weights = scores.softmax(dim=-1)  # not exp(scores - lse), which is wrong for scores near the dtype's minimum
        outs.append(weights.masked_fill((lse == -torch.inf).unsqueeze(-1), 0.0) @ values)
        lses.append(lse)
    return torch.cat(outs, dim=2).to(q.dtype), torch.cat(lses, dim=2)


def _flash_on_cpu(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool) -> Result:
    q, k, v = _dense(q, k, v)  # other strides give NaN
    mask = None if mask is None else mask.to(q.dtype)
    out, lse = aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, 0.0, causal, attn_mask=mask, scale=scale)
    return _with_dead_rows(out, lse, mask)  # for these rows, the operator returns an LSE of 0


def _dense(*tensors: Tensor) -> list[Tensor]:
    """Make the elements of each head contiguous, as kernels require."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]


def _with_dead_rows(out: Tensor, lse: Tensor, mask: Tensor | None) -> Result:
    """Write zeros, and an LSE of minus infinity, to rows for which the mask hides every key."""
    if mask is None:
        return out, lse
    dead = (mask == -torch.inf).all(dim=-1)
    return out.masked_fill(dead.unsqueeze(-1), 0.0), lse.masked_fill(dead, -torch.inf)


def _flash_on_cpu_takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    # With a length of zero, this operator ends the process with SIGFPE.
    return q.device.type == "cpu" and 0 not in (*q.shape, *k.shape) and q.shape[-1] == v.shape[-1]


def _aten_flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool) -> Result:
    return aten._scaled_dot_product_flash_attention(*_dense(q, k, v), 0.0, causal, scale=scale)[:2]


def _aten_efficient(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool) -> Result:
    mask = None if mask is None else mask.to(q.dtype)
    bias = None if mask is None else _aligned(mask).expand(*q.shape[:3], k.shape[2])
    run = aten._scaled_dot_product_efficient_attention
    out, lse = run(*_dense(q, k, v), bias, True, 0.0, causal, scale=scale)[:2]
    return _with_dead_rows(out, lse.narrow(2, 0, q.shape[2]), mask)  # the kernel pads the LSE to a multiple of 32 rows


def _aligned(mask: Tensor) -> Tensor:
    """Align the mask's rows to multiples of 8 elements: the efficient kernel reads 8 at a time."""
    if mask.stride(-1) == 1 and not any(step % 8 for step in (*mask.stride()[:-1], mask.storage_offset())):
        return mask
    keys = mask.shape[-1]
    return mask.new_zeros(*mask.shape[:-1], -(-keys // 8) * 8).narrow(-1, 0, keys).copy_(mask)


def _aten_cudnn(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool) -> Result:
    run = aten._scaled_dot_product_cudnn_attention
    out, lse = run(*_dense(q, k, v), None, True, 0.0, causal, scale=scale)[:2]
    return out, lse.reshape(q.shape[:3])  # in some releases, the LSE has an additional dimension


def _on_accelerator(q: Tensor, k: Tensor, v: Tensor) -> bool:
    return (
        q.device.type != "cpu" and 0 not in (*q.shape, *k.shape) and q.shape[-1] % 8 == 0 and q.shape[-1] == v.shape[-1]
    )


def _half_on_accelerator(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None,
    architecture: tuple[int, int] = AMPERE,
    before: tuple[int, int] | None = None,
) -> bool:
    fits = _on_accelerator(q, k, v) and mask is None and q.dtype in HALF and q.shape[-1] <= 256
    return fits and devices.has_architecture(architecture, before)


def _cudnn_takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    return _half_on_accelerator(q, k, v, mask) and q.shape[-1] <= CUDNN_HEAD and k.shape[2] > 1


def _efficient_takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    known = q.dtype in (torch.float32, *HALF)
    return known and _on_accelerator(q, k, v) and (q.dtype != torch.bfloat16 or devices.has_architecture(AMPERE))


def _needs_accelerator() -> str | None:
    return "no accelerator on this machine" if devices.device_type() == "cpu" else None


def _flash_attn(package: str, architecture: tuple[int, int], before: tuple[int, int] | None = None) -> Kernel:
    """A package's kernel, for CUDA architectures from ``architecture`` on and, if given, earlier than ``before``."""
    return Kernel(
        lambda: flash_attn.absent(package) or _needs_accelerator() or flash_attn.unusable(package),
        partial(_half_on_accelerator, architecture=architecture, before=before),
        partial(flash_attn.run, package),
    )


def _flash(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool) -> Result:
    return (_flash_on_cpu if q.device.type == "cpu" else _aten_flash)(q, k, v, mask, scale, causal)


def _flash_takes(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> bool:
    return _flash_on_cpu_takes(q, k, v, mask) or _half_on_accelerator(q, k, v, mask)


# In order of preference.
KERNELS: dict[str, Kernel] = {
    "flash_attn_3": _flash_attn("flash_attn_interface", HOPPER, BLACKWELL),
    "flash_attn": _flash_attn("flash_attn", AMPERE),
    "cudnn": Kernel(_needs_accelerator, _cudnn_takes, _aten_cudnn),
    "flash": Kernel(lambda: None, _flash_takes, _flash),
    "efficient": Kernel(_needs_accelerator, _efficient_takes, _aten_efficient),
    "math": Kernel(lambda: None, lambda q, k, v, mask: True, attention_math),
}
AUTO = ("flash_attn_3", "flash_attn", "flash", "efficient", "math")
TORCHS_CHOICE = ("auto", "sdpa", dispatch.NATIVE)


def available_backends() -> list[str]:
    """Names that ``--attention_backend`` accepts on this machine, in addition to those of Diffusers."""
    return ["auto", "sdpa", *(name for name, kernel in KERNELS.items() if kernel.missing() is None)]


def check_backend(name: str) -> None:
    """Raise a ValueError if the backend is unknown or not available here."""
    if name in (dispatch.NATIVE, *available_backends()):
        return
    why = KERNELS[name].missing() if name in KERNELS else dispatch.missing(name)
    if why:
        here = ", ".join(available_backends())
        raise ValueError(f"attention_backend={name!r}: {why}; here there are {here}, and backends of Diffusers")


def additive(mask: Tensor, dtype: torch.dtype) -> Tensor:
    """Convert any mask that SDPA accepts to one that is added to the scores."""
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros(mask.shape, dtype=dtype, device=mask.device).masked_fill(~mask, -torch.inf)


def autocast(*tensors: Tensor | None) -> list[Tensor | None]:
    """Cast the tensors to the dtype that ``torch.autocast`` selects for attention, if it is enabled."""
    kind = next(x.device.type for x in tensors if x is not None)
    if not torch.is_autocast_enabled(kind):
        return list(tensors)
    dtype = torch.get_autocast_dtype(kind)
    return [x.to(dtype) if x is not None and x.is_floating_point() else x for x in tensors]


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    causal: bool = False,
) -> Tensor:
    """Attention without the LSE, by torch's choice of kernel or by ``backend``; shapes as in the module docstring."""
    k, v = _for_query_heads(q, k, v)
    if 0 in (*q.shape, k.shape[2]):
        return q.new_zeros(*q.shape[:3], v.shape[-1])
    if backend in TORCHS_CHOICE:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal, scale=scale)
    if backend not in KERNELS:
        return dispatch.run(backend, q, k, v, mask, scale)
    return attention_with_lse(q, k, v, mask, scale, backend, causal)[0]


def attention_with_lse(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor | None = None,
    scale: float | None = None,
    backend: str = "auto",
    causal: bool = False,
) -> Result:
    """Attention and its LSE from ``backend`` or, if it does not support the tensors, from the next kernel that does.

    The mask may be any that SDPA accepts, including booleans and fewer dimensions.
    """
    k, v = _for_query_heads(q, k, v)
    if mask is not None:
        mask = additive(mask[(None,) * (4 - mask.dim())], q.dtype)
    if backend not in KERNELS and backend not in TORCHS_CHOICE:
        if 0 not in (*q.shape, *k.shape) and (found := dispatch.run_with_lse(backend, q, k, v, mask, scale)):
            return found
        backend = dispatch.WITH_LSE.get(backend, "auto")
    run = KERNELS[_kernel_for(q, k, v, mask, backend)].run
    if not torch.is_autocast_enabled(q.device.type):
        return run(q, k, v, mask, scale, causal)
    q, k, v, mask = autocast(q, k, v, mask)
    with torch.autocast(q.device.type, enabled=False):  # autocast would lower the precision of the kernels' sums
        return run(q, k, v, mask, scale, causal)


def _kernel_for(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, backend: str) -> str:
    named = () if backend in TORCHS_CHOICE else (backend,)
    name = next(n for n in (*named, *AUTO) if KERNELS[n].missing() is None and KERNELS[n].takes(q, k, v, mask))
    if name != backend and (named or name == "math"):
        _warn_fallback(backend, tuple(q.shape), str(q.dtype), mask is not None, name)
    return name


def _for_query_heads(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
    """Repeat the heads of keys and values to as many as there are query heads (for grouped queries)."""
    if q.shape[1] == k.shape[1]:
        return k, v
    repeats = q.shape[1] // k.shape[1]
    return k.repeat_interleave(repeats, dim=1), v.repeat_interleave(repeats, dim=1)


@cache
def _warn_fallback(backend: str, shape: tuple[int, ...], dtype: str, masked: bool, name: str) -> None:
    logger.warning(
        "attention backend %s does not support %s %s%s: the kernel %s runs instead",
        backend, dtype, shape, " with a mask" if masked else "", name,
    )  # fmt: skip
