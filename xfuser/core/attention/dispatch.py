"""Attention backends of Diffusers (flex, sage, xformers, ...), by the names that ``set_attention_backend()`` takes.

Diffusers keeps one function per name, over query, key and value ``[B, S, H, D]``. Within a wrapped call, attention
modules call replacements that compute over several ranks, and use the backend's function for each rank's local part.
"""

import functools
import importlib
import importlib.util
import inspect
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from xfuser.core.hooks import replaced
from xfuser.core.logger import logger

MODULE = "diffusers.models.attention_dispatch"
NATIVE = "native"  # scaled_dot_product_attention, which intercept.py replaces itself
QKV = ("query", "key", "value")
OF_SDPA = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
# Kernels of this library that return an LSE, for backends with the same arithmetic that return none.
WITH_LSE = {
    "_native_math": "math", "_native_flash": "flash", "_native_efficient": "efficient", "_native_cudnn": "cudnn",
}  # fmt: skip
WITHOUT_LSE = (  # although they accept return_lse: they return none, or that of a packed batch
    "flex", "flash_varlen", "flash_varlen_hub", "_flash_varlen_3", "_flash_3_varlen_hub", "flash_4_hub", "sage_varlen",
)  # fmt: skip
KEYS = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


class _Asked(threading.local):
    """How this thread's current attention was requested: the backend, and whether from a compiled block."""

    backend, compiled = "auto", False


asked = _Asked()


def missing(name: str) -> str | None:
    """Why Diffusers' backend of this name is not available here; None if it is. May fetch its kernel from the hub."""
    if importlib.util.find_spec("diffusers") is None:
        return "unknown"
    module = importlib.import_module(MODULE)
    try:
        with module.attention_backend(name):
            return None
    except (ValueError, RuntimeError, ImportError) as error:
        return "unknown" if name not in module._AttentionBackendRegistry._backends else str(error)


def taken(attend: Callable[[str, Callable[[], dict[str, Any]]], Tensor | None]) -> AbstractContextManager[None]:
    """Within the context, Diffusers' backends except ``native`` return ``attend(name, arguments)``, ``[B, H, S, D]``.

    ``arguments()`` returns the arguments of ``scaled_dot_product_attention``. If ``attend`` returns None, the backend's
    own function runs.
    """
    registry = _registry()
    if registry is None:
        return nullcontext()
    return replaced(registry, "_backends", {key: _taking(key, fn, attend) for key, fn in registry._backends.items()})


def _taking(key: Any, function: Callable[..., Any], attend: Callable[..., Tensor | None]) -> Callable[..., Any]:
    name = str(getattr(key, "value", key))  # a member of Diffusers' enumeration, or a key registered by other code
    if name == NATIVE:
        return function
    defaults = {one.name: one.default for one in inspect.signature(function).parameters.values()}
    names = tuple(defaults)

    @functools.wraps(function)
    def backend(*args: Any, **kwargs: Any) -> Any:
        given = dict(zip(names, args, strict=False)) | kwargs
        out = attend(name, lambda: _as_for_sdpa(name, given, defaults))
        return function(**given) if out is None else out.transpose(1, 2)

    backend.in_place_of = function
    return backend


def _as_for_sdpa(name: str, given: dict[str, Any], defaults: dict[str, Any]) -> dict[str, Any]:
    """Convert a backend's arguments to those of ``scaled_dot_product_attention``, ``[B, H, S, D]``.

    Raises:
        ValueError: an argument has no counterpart there.
    """
    mask = given.get("attn_mask")
    if isinstance(mask, Tensor) and mask.shape == (given["key"].shape[0], given["key"].shape[1]):
        mask = mask[:, None, None]
    others = [one for one, x in given.items() if one not in (*QKV, *OF_SDPA) and x != defaults[one]]
    if others or not isinstance(mask, Tensor | None):
        raise ValueError(
            f"the attention backend {name!r} was given {', '.join(others) or type(mask).__name__}, which cannot be"
            " split over ranks: remove it, or use CFG, data or tensor parallelism"
        )
    arguments = {one: given[one] for one in OF_SDPA if one in given} | {"attn_mask": mask}
    return arguments | {one: given[one].transpose(1, 2) for one in QKV}


def run(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None) -> Tensor:
    """Attention by Diffusers' backend of this name, ``[B, H, S, D]``.

    Raises:
        ValueError: there is a mask, and the backend does not support masks.
    """
    return _call(name, q, k, v, mask, scale).transpose(1, 2)


def run_with_lse(
    name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor] | None:
    """As :func:`run`, with the LSE, ``[B, H, S]``; None if the backend returns no LSE.

    A backend for which ``WITH_LSE`` has no kernel is then reported in a warning, once.
    """
    if name in WITH_LSE or q.shape[1] == q.shape[2]:  # some return [B, S, H], which then could not be told
        return None
    why = "Diffusers returns none"
    if name not in WITHOUT_LSE and "return_lse" in _parameters(_function(name)):
        try:
            result = _call(name, q, k, v, mask, scale, return_lse=True)
            if isinstance(result, tuple) and isinstance(result[1], Tensor):
                out, lse = result[:2]
                return out.transpose(1, 2), lse.float() if lse.shape[1] == q.shape[1] else lse.mT.float()
            why = "it returned none"
        except (ValueError, NotImplementedError) as error:
            why = str(error)
    _warn_no_lse(name, why)
    return None


def _registry() -> Any:
    """Diffusers' registry of backends; None in releases without one, or if its module has not been imported."""
    return getattr(sys.modules.get(MODULE), "_AttentionBackendRegistry", None)


def _function(name: str) -> Callable[..., Any]:
    """Diffusers' own function, not a replacement: it outlives the call, so caches keyed by it stay valid."""
    function = _registry()._backends[name]
    while hasattr(function, "in_place_of"):
        function = function.in_place_of
    return function


@functools.cache
def _parameters(function: Callable[..., Any]) -> tuple[str, ...]:
    return tuple(inspect.signature(function).parameters)


def _call(name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, **more: Any) -> Any:
    function = _function(name)
    names = _parameters(function)
    if mask is not None and "attn_mask" not in names:
        raise ValueError(f"the attention backend {name!r} does not support masks, and this model has one: use 'native'")
    if mask is not None:
        mask = mask[(None,) * (4 - mask.dim())]  # these functions do not broadcast as SDPA
    if mask is not None and "varlen" in name:
        k, v, mask = _kept_first(k, v, mask)
    if mask is not None and name == "xformers":  # it converts and aligns [B, S]; to others it gives booleans as 0 and 1
        if mask.shape[1:3] == (1, 1):
            mask = mask[:, 0, 0].expand(k.shape[0], -1)
        elif mask.dtype == torch.bool:
            mask = torch.where(mask, 0.0, -torch.inf)
    if name == "flex" and asked.compiled:  # without a compiler, flex holds all scores at once
        function = _compiled(function)
    given = {"attn_mask": mask, "scale": scale, **more}
    given = {key: value for key, value in given.items() if key in names}
    return function(*(x.transpose(1, 2) for x in (q, k, v)), **given)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The compiled function, for calls within an operator: tracing requires the dispatch keys from outside of it."""
    code = torch.compile(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ForceDispatchKeyGuard(*KEYS):
            return code(*args, **kwargs)

    return call


def _kept_first(k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Reorder keys and values so that those hidden by a key mask come last, as kernels that take lengths require.

    The mask, ``[B|1, 1, 1, S]``, is returned in the same order, as booleans.
    """
    shown = (mask if mask.dtype == torch.bool else mask != -torch.inf).expand(k.shape[0], 1, 1, k.shape[2])
    order = (~shown).to(torch.uint8).argsort(dim=-1, stable=True)
    places = order.mT.expand(-1, k.shape[1], -1, -1)
    k, v = (x.gather(2, places.expand(-1, -1, -1, x.shape[-1])) for x in (k, v))
    return k, v, shown.gather(-1, order)


@functools.cache
def _warn_no_lse(name: str, why: str) -> None:
    logger.warning(
        "the attention backend %s returns no log-sum-exp, which the ring requires (%s): a kernel of this library"
        " computes the ring's blocks instead; with Ulysses only, %s computes all attention",
        name, why, name,
    )  # fmt: skip
