"""Replaces ``torch.nn.functional.scaled_dot_product_attention`` inside chosen attention modules only."""

import functools
import threading
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from xfuser.core.attention import dispatch, operator
from xfuser.core.attention.kernels import autocast
from xfuser.core.hooks import innermost, replaced

Attend = Callable[..., Tensor]


class _Running(threading.local):
    """The attention module whose forward this thread is running."""

    module: "_Attention | None" = None


class _Attention:
    """One attention module: the functions that compute its attention, and the number of calls in this forward."""

    def __init__(self, attend: Attend, again: Attend | None) -> None:
        self.attend, self.again, self.count = attend, again, 0


class _Traced:
    """The same while a compiler traces a block: only the module's place in the block, as all else differs by block."""

    def __init__(self) -> None:
        self.place, self.count, self.again = "", 0, False


@contextmanager
def intercepted(
    modules: dict[str, nn.Module],
    attend: Callable[[str], Attend],
    many: bool = False,
    idle: tuple[str, ...] = (),
    places: dict[str, str] | None = None,
    again: dict[str, Attend] | None = None,
) -> Iterator[None]:
    """Within the context, each of ``modules`` computes its attention by ``attend(name)``.

    ``torch.nn.functional.scaled_dot_product_attention`` and Diffusers' attention backends are replaced for the duration
    of the context. Outside of these modules, and in other threads, the replacements call the real functions.

    ``attend(name)`` gets query, key, value, mask and scale of the call. A module raises a ValueError unless its
    processor calls attention exactly once per forward (at least once with ``many``), as its attention would not be the
    one intended. A module that is passed a true value for an argument in ``idle`` may make no call. For compiled
    blocks, ``places`` are the modules' names within their blocks. Modules in ``again`` may call attention several times
    in a forward; ``again[name]`` computes all calls except the first.
    """
    running, traced, original = _Running(), _Traced(), F.scaled_dot_product_attention

    def computed(backend: str, operands: Callable[[], tuple[Any, ...]]) -> Tensor | None:
        """The running module's attention, requested from this backend; None if none of ``modules`` is running."""
        if torch.compiler.is_compiling():
            if not traced.place:
                return None
            traced.count += 1
            by = "again" if traced.again and traced.count > 1 else "attend"
            return operator.attend(*operands(), f"{traced.place}.forward.{by}", backend)
        module = running.module
        if module is None:
            return None
        module.count += 1
        running.module = None  # the function that computes the attention may call the replacement
        dispatch.asked.backend = backend
        try:
            return (module.again if module.again and module.count > 1 else module.attend)(*operands())
        finally:
            running.module, dispatch.asked.backend = module, "auto"

    @functools.wraps(original)
    def attention(*args: Any, **kwargs: Any) -> Tensor:
        out = computed("auto", lambda: what_matters(*args, **kwargs))
        return original(*args, **kwargs) if out is None else out

    def by_backend(backend: str, arguments: Callable[[], dict[str, Any]]) -> Tensor | None:
        return computed(backend, lambda: what_matters(**arguments()))

    def counted(name: str, module: nn.Module, attend: Attend, place: str) -> Callable[..., Any]:
        """A forward that marks its attention module as running, and checks how often it called attention."""
        forward_of_module, more = getattr(*innermost(module)), (again or {}).get(name)

        def check(count: int, kwargs: dict[str, Any]) -> None:
            if count == 1 or (count and (many or more)) or (count == 0 and any(map(kwargs.get, idle))):
                return
            processor = type(getattr(module, "processor", module)).__name__
            raise ValueError(
                f"{name}: {processor} called scaled_dot_product_attention {count} times in one forward, and must"
                " call it, or an attention backend of Diffusers, once. Use the processors that the model came with"
            )

        @functools.wraps(forward_of_module)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if torch.compiler.is_compiling():
                traced.place, traced.count, traced.again = place, 0, more is not None
                output, count = forward_of_module(*args, **kwargs), traced.count
                traced.place, traced.count = "", 0
                check(count, kwargs)
                return output
            outer, running.module = running.module, (own := _Attention(attend, more))
            try:
                output = forward_of_module(*args, **kwargs)
            finally:
                running.module = outer
            check(own.count, kwargs)
            return output

        forward.attend, forward.again = attend, more
        return forward

    with ExitStack() as stack:
        for name, module in modules.items():
            place = (places or {}).get(name, name)
            # Inside the hooks of caches, which skip attention in some steps.
            stack.enter_context(replaced(*innermost(module), counted(name, module, attend(name), place)))
        stack.enter_context(replaced(F, "scaled_dot_product_attention", attention))
        stack.enter_context(dispatch.taken(by_backend))
        yield


def what_matters(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, float | None]:
    """Query, key, value, mask and scale of a call of ``scaled_dot_product_attention`` (``[B, H, S, D]``).

    Tensors are cast to the dtype that ``torch.autocast`` selects for it, so that ranks exchange tensors of one dtype.

    Raises:
        ValueError: the call requests something that is not supported over shards.
    """
    if is_causal or dropout_p:
        raise ValueError(
            f"attention over several ranks supports neither causal attention (is_causal={is_causal}) nor dropout"
            f" (dropout_p={dropout_p}): put the model in eval mode"
        )
    return *autocast(query, key, value, attn_mask), scale
