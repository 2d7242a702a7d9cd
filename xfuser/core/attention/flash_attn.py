"""The packages flash-attn 2 and 3, called through the function that both publish: ``flash_attn_func``.

Its arguments and results differ between releases, so its signature decides how it is called. A release that cannot be
imported or lacks a required argument counts as missing, and the next kernel runs.
"""

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable
from functools import cache

from torch import Tensor

from xfuser.core.logger import logger

NEEDED = {"q", "k", "v", "softmax_scale", "causal"}
RETURNS_LSE = "return_attn_probs"  # in releases whose function returns only the output by default


@cache
def absent(package: str) -> str | None:
    """A message if the package, ``flash_attn`` (2) or ``flash_attn_interface`` (3), is not installed; None if it is."""
    there = package in sys.modules or importlib.util.find_spec(package)
    return None if there else f"the package {package} is not installed"


@cache
def unusable(package: str) -> str | None:
    """Why the installed release cannot be used; None if it can."""
    try:
        lacks = ", ".join(sorted(NEEDED.difference(_parameters(package))))
        why = lacks and f"takes no {lacks}"
    except (ImportError, AttributeError, ValueError) as error:  # ValueError: it has no signature
        why = f"cannot be used ({error})"
    if not why:
        return None
    logger.warning("%s.flash_attn_func %s: the next attention kernel runs instead", package, why)
    return f"{package}.flash_attn_func {why}"


def run(
    package: str, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, scale: float | None, causal: bool
) -> tuple[Tensor, Tensor]:
    """Output and LSE, as the kernels of ``kernels.py`` return them; the package's layout is ``[B, S, H, D]``."""
    q, k, v = (x.transpose(1, 2).contiguous() for x in (q, k, v))
    more = {RETURNS_LSE: True} if RETURNS_LSE in _parameters(package) else {}
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    result = _function(package)(q, k, v, softmax_scale=scale, causal=causal, **more)
    if not isinstance(result, tuple):
        raise ValueError(f"{package}.flash_attn_func returned no LSE: use another attention_backend, such as 'flash'")
    return result[0].transpose(1, 2), result[1]


def _function(package: str) -> Callable[..., object]:
    return importlib.import_module(package).flash_attn_func


@cache
def _parameters(package: str) -> tuple[str, ...]:
    return tuple(inspect.signature(_function(package)).parameters)
