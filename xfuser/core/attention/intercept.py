"""Replaces ``torch.nn.functional.scaled_dot_product_attention`` inside chosen attention modules, and only there."""

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
    """The attention module whose forward this thread is in."""

    module: "_Attention | None" = None


class _Attention:
    """One attention module: what computes its attention, and how often it was asked to in this forward."""

    def __init__(self, attend: Attend, again: Attend | None) -> None:
        self.attend, self.again, self.count = attend, again, 0


class _Traced:
    """The same while a compiler traces a block: the place of the module in the block, as all else differs by block."""

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

    ``torch.nn.functional`` has another function in the place of ``scaled_dot_product_attention`` as long as the context
    lasts, and Diffusers in the place of its attention backends. Outside of these modules, and in other threads, they
    call the real ones.

    The replacement takes query, key, value, mask and scale of ``scaled_dot_product_attention``. A module whose
    processor does not call that function exactly once per forward, or at least once with ``many``, raises a ValueError:
    its attention would not be the one intended. One of the arguments ``idle`` that is true says that it attends to
    nothing. ``places`` are the modules' names within their blocks, where these are compiled. Modules of ``again`` may
    call the function more than once in a forward, and compute all calls but the first by ``again[name]``.
    """
    running, traced, original = _Running(), _Traced(), F.scaled_dot_product_attention

    def computed(backend: str, operands: Callable[[], tuple[Any, ...]]) -> Tensor | None:
        """The attention of the module that runs, asked for by this backend; None where none of ``modules`` runs."""
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
        running.module = None  # what computes the attention may come here
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
        """The forward of an attention module, which says that it runs, and checks how it computed attention."""
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
            # Within the hooks of caches, which leave attention out in some steps.
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

    They are in the dtype that ``torch.autocast`` runs it in, so that ranks exchange tensors of one dtype.

    Raises:
        ValueError: the call asks for what attention over shares does not do.
    """
    if is_causal or dropout_p:
        raise ValueError(
            f"attention over several ranks is neither causal (is_causal={is_causal}) nor has it dropout"
            f" (dropout_p={dropout_p}): put the model in eval mode"
        )
    return *autocast(query, key, value, attn_mask), scale
