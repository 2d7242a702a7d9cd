"""Attention backends of Diffusers (flex, sage, xformers, ...), by the names that ``set_attention_backend()`` takes.

Diffusers keeps one function a name, over query, key and value ``[B, S, H, D]``. Within a wrapped call, attention
modules reach others in their place, which have several ranks compute. What is local to a rank then runs the function.
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
NATIVE = "native"  # scaled_dot_product_attention, which is intercepted itself
QKV = ("query", "key", "value")
OF_SDPA = ("attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
# Kernels of this library that give an LSE, for backends of the same arithmetic that give none.
WITH_LSE = {
    "_native_math": "math", "_native_flash": "flash", "_native_efficient": "efficient", "_native_cudnn": "cudnn",
}  # fmt: skip
WITHOUT_LSE = ("flex", "flash_varlen", "_flash_varlen_3", "sage_varlen")  # although they take return_lse
KEYS = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()


class _Asked(threading.local):
    """How the attention that this thread computes was asked for: by which backend, and in a compiled block or not."""

    backend, compiled = "auto", False


asked = _Asked()


def missing(name: str) -> str | None:
    """Why Diffusers' backend of this name cannot be had here; None where it can. Fetches its kernel from the hub."""
    if importlib.util.find_spec("diffusers") is None:
        return "unknown"
    module = importlib.import_module(MODULE)
    try:
        with module.attention_backend(name):
            return None
    except (ValueError, RuntimeError, ImportError) as error:
        return "unknown" if name not in module._AttentionBackendRegistry._backends else str(error)


def taken(attend: Callable[[str, Callable[[], dict[str, Any]]], Tensor | None]) -> AbstractContextManager[None]:
    """Within the context, Diffusers' backends but ``native`` return ``attend(name, arguments)``, ``[B, H, S, D]``.

    ``arguments()`` are those of ``scaled_dot_product_attention``. Where the result is None, the backend's own function
    runs.
    """
    registry = _registry()
    if registry is None:
        return nullcontext()
    return replaced(registry, "_backends", {key: _taking(key, fn, attend) for key, fn in registry._backends.items()})


def _taking(key: Any, function: Callable[..., Any], attend: Callable[..., Tensor | None]) -> Callable[..., Any]:
    name = str(getattr(key, "value", key))  # a member of Diffusers' enumeration, or what somebody registered
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
    """A backend's arguments as ``scaled_dot_product_attention`` takes them, ``[B, H, S, D]``.

    Raises:
        ValueError: one has no counterpart there.
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
        ValueError: it takes no mask, and there is one.
    """
    return _call(name, q, k, v, mask, scale).transpose(1, 2)


def run_with_lse(
    name: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None
) -> tuple[Tensor, Tensor] | None:
    """The same with its LSE, ``[B, H, S]``; None where the backend gives none, which is said once."""
    if name in WITH_LSE:
        return None
    why = "Diffusers returns none"
    if name not in WITHOUT_LSE and "return_lse" in _parameters(_function(name)):
        try:
            result = _call(name, q, k, v, mask, scale, return_lse=True)
            if isinstance(result, tuple):
                out, lse = result[:2]
                return out.transpose(1, 2), lse.float() if lse.shape[1] == q.shape[1] else lse.mT.float()
            why = "it returned none"
        except (ValueError, NotImplementedError) as error:
            why = str(error)
    _warn_no_lse(name, why)
    return None


def _registry() -> Any:
    """Where Diffusers keeps its backends; None in releases that have none, or while nobody has imported it."""
    return getattr(sys.modules.get(MODULE), "_AttentionBackendRegistry", None)


def _function(name: str) -> Callable[..., Any]:
    """Diffusers' own function, which outlives the call: what is cached for it is, too."""
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
        raise ValueError(f"the attention backend {name!r} takes no mask, and this model has one: use 'native'")
    if mask is not None and "varlen" in name:
        k, v, mask = _kept_first(k, v, mask)
    if name == "flex" and asked.compiled:  # which holds all scores at once where it is not
        function = _compiled(function)
    given = {"attn_mask": mask, "scale": scale, **more}
    given = {key: value for key, value in given.items() if key in names}
    return function(*(x.transpose(1, 2) for x in (q, k, v)), **given)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    """The function, compiled, to be called within an operator: tracing it needs the dispatch keys as outside of one."""
    code = torch.compile(function)

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch._C._ForceDispatchKeyGuard(*KEYS):
            return code(*args, **kwargs)

    return call


def _kept_first(k: Tensor, v: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values in another order: those that a key mask hides are last, as kernels that take lengths have them.

    The mask, ``[B|1, 1, 1, S]``, comes back as one of booleans.
    """
    shown = (mask if mask.dtype == torch.bool else mask != -torch.inf).expand(k.shape[0], 1, 1, k.shape[2])
    order = (~shown).to(torch.uint8).argsort(dim=-1, stable=True)
    places = order.mT.expand(-1, k.shape[1], -1, -1)
    k, v = (x.gather(2, places.expand(-1, -1, -1, x.shape[-1])) for x in (k, v))
    return k, v, shown.gather(-1, order)


@functools.cache
def _warn_no_lse(name: str, why: str) -> None:
    logger.warning(
        "the attention backend %s gives no log-sum-exp, which the ring needs (%s): a kernel of this library computes"
        " the ring's blocks instead; with Ulysses alone, %s computes all",
        name, why, name,
    )  # fmt: skip
