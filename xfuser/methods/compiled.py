"""Compiled blocks: each class of blocks is compiled once, and the rest of the transformer runs eagerly.

Hooks around the blocks stay in Python. Inside a block, attention over several ranks is a custom operator
(``core/attention/operator.py``), so each block is one graph, and the blocks of a class share it.
"""

import types
from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import wraps
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo.exc import TorchDynamoException

from xfuser.call import CallState
from xfuser.core.attention import operator
from xfuser.core.hooks import innermost, replaced
from xfuser.core.logger import is_rank_zero, logger
from xfuser.methods.cache.hooks import cached
from xfuser.models.plan import ModelPlan, blocks_of
from xfuser.models.registry import original_of

Compiler = Callable[[Callable[..., Any]], Callable[..., Any]]


class CompiledBlocks:
    """The blocks of a transformer, compiled once per class, during the calls of a wrapped pipeline.

    Args:
        compiler: ``torch.compile``, or the compiler, with its options, of an earlier ``torch.compile`` of the model.
        pipe: the pipeline; if its progress bar is on, rank 0 shows how many classes have been compiled.
    """

    def __init__(self, model: nn.Module, plan: ModelPlan, compiler: Compiler, pipe: Any) -> None:
        self._model, self._plan, self._compiler, self._pipe = model, plan, compiler, pipe
        self._code: dict[type, Callable[..., Any]] = {}
        self._new: set[type] = set()  # classes that have not run yet
        self._failed: set[type] = set()
        self._progress: Any = None
        if not plan.blocks:
            logger.warning("the plan of %s names no blocks to compile: it runs eagerly", type(model).__name__)

    def enter(self, call: CallState) -> None:
        """During the call, blocks run compiled code. Must be called before anything hooks into blocks."""
        blocks = [block.module for block in blocks_of(self._model, self._plan)]
        for block in filter(_compiles, blocks):
            if type(block) not in self._code:
                self._code[type(block)] = self._compiler(_region(type(block).__name__))
                self._new.add(type(block))
            call.enter_context(replaced(*innermost(block), self._forward_of(block)))
        if self._new:
            self._progress = call.enter_context(self._bar(len(self._new)))

    def _forward_of(self, block: nn.Module) -> Callable[..., Any]:
        original, kind = getattr(*innermost(block)), type(block)

        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            if kind in self._failed:
                return original(*args, **kwargs)
            try:
                named = {name: _dense(x) for name, x in kwargs.items()}
                with operator.running(block):
                    output = self._code[kind](kind.forward, block, *map(_dense, args), **named)
            except TorchDynamoException as error:
                self._failed.add(kind)
                logger.warning("%s cannot be compiled and runs eagerly: %s", kind.__name__, error)
                output = original(*args, **kwargs)
            if kind in self._new:
                self._new.remove(kind)
                self._progress.update()
            return output

        return forward

    def _bar(self, classes: int) -> Any:
        from tqdm.auto import tqdm  # comes with Diffusers

        hidden = getattr(self._pipe, "_progress_bar_config", {}).get("disable", False) or not is_rank_zero()
        description = f"Compiling blocks of {type(self._model).__name__}"
        return tqdm(total=classes, desc=description, unit="class", disable=hidden)


def _compiles(block: nn.Module) -> bool:
    """Whether a block runs its class's forward, and no cache inside it may skip a part of that.

    A forward that is set on one instance, such as a stub, is not its class's.
    """
    own = getattr(getattr(*innermost(block)), "__func__", None) is type(block).forward
    return own and all(one.module is block for one in cached(block))


def _region(name: str) -> Callable[..., Any]:
    """A function with its own code object: torch keeps compiled code per code object, up to a small limit."""

    def region(forward: Callable[..., Any], block: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return forward(block, *args, **kwargs)

    return types.FunctionType(region.__code__.replace(co_name=name), region.__globals__, name)


def _dense(x: Any) -> Any:
    """The tensor, contiguous and not a view: other strides, or views, would require further graphs."""
    if not isinstance(x, Tensor):
        return x
    return x.contiguous().view(-1).view(x.shape).data if x.numel() else x.new_empty(x.shape)


def uncompiled(stack: ExitStack, pipe: Any, names: Iterable[str]) -> Compiler | None:
    """Until the stack closes, these components of a pipeline, and all modules in them, are the uncompiled originals.

    Compiled code would bypass the hooks of the methods, which did not exist when it was compiled. The original takes
    the place of the module that ``torch.compile(module)`` returned; the latter calls the original if it is still
    called. The code of ``module.compile()`` is taken off the module. Afterwards everything is compiled as before,
    except what has been replaced meanwhile.

    Returns the compiler of the first compiled module; None if nothing was compiled.
    """
    found = [compiler for name in names for compiler in _taken_out(stack, pipe, name)]
    return found[0] if found else None


def _taken_out(stack: ExitStack, pipe: Any, name: str) -> list[Compiler]:
    """Replace all compiled modules of a component by their originals; returns their compilers."""
    given = getattr(pipe, name)
    found = _aside(stack, vars(pipe), name, given)
    for module in list(original_of(given).modules()):
        if compiled := vars(module).get("_compiled_call_impl"):
            stack.enter_context(replaced(module, "_compiled_call_impl", None))
            cells = [cell.cell_contents for cell in compiled.__closure__ or ()]
            found.append(next((one for one in cells if hasattr(one, "compiler_config")), torch.compile))
        for key, child in module._modules.items():
            if child is not None:
                found += _aside(stack, module._modules, key, child)
    return found


def _aside(stack: ExitStack, places: dict[str, Any], key: str, compiled: nn.Module) -> list[Compiler]:
    """Replace a compiled module by its original until the stack closes; returns its compiler, if any."""
    original = original_of(compiled)
    if original is compiled:
        return []

    def put_back() -> None:
        if places.get(key) is original:
            places[key] = compiled

    places[key] = original
    stack.callback(put_back)
    stack.enter_context(replaced(compiled, "forward", original.__call__))
    return [compiled.dynamo_ctx]
