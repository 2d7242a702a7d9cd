"""Count repeated modules without running them: one of each kind runs, and its counts are reused for the others.

A transformer block is skipped if its class, its parameters' shapes, and its arguments' shapes equal those of a block
that ran before in the same step, with this patch or another one. Patch 0 is counted separately, as only it has the
text. The first and last block of a list always run, and are not reused for others, because the engine's hooks act
there. A VAE that works tile by tile or frame by frame is treated in the same way.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import wraps
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from xfuser.core.hooks import replaced
from xfuser.core.meters import LiveMemory
from xfuser.models.plan import ModelPlan, blocks_of
from xfuser.planner.trace import Event, Trace

BLENDS = ("blend_v", "blend_h", "blend_t")  # blend a VAE's tiles: thousands of operators on single rows
ENDS = 1  # blocks at each end of a list that always run


@dataclass(frozen=True)
class _Shape:
    """Placeholder for a tensor."""

    sizes: torch.Size
    dtype: torch.dtype


class Seen(NamedTuple):
    """Result of the last module of a kind: its events, the shapes of its output, the bytes that it left alive, and the
    largest storage among these; the bytes of skipped modules are counted while this storage is alive."""

    events: list[Event]
    output: Any
    left: int
    storage: int | None


@contextmanager
def repeats(
    model: nn.Module, plan: ModelPlan | None, trace: Trace, meter: LiveMemory, last: dict[Any, Seen]
) -> Iterator[None]:
    """Context for one call of a component, in which repeated modules are counted without running.

    Hooks must already be in place. For a skipped module, ``trace`` gets the tuple ``(events, 1)``. ``last`` holds the
    modules that ran before, in this call and in others of its step.
    """
    with ExitStack() as stack:
        if plan is None:
            for name in (name for name in BLENDS if hasattr(model, name)):
                stack.enter_context(replaced(model, name, lambda above, tile, extent: tile))
            for name in ("encoder", "decoder"):
                if isinstance(module := getattr(model, name, None), nn.Module):
                    stack.enter_context(_counted(module, name, last, trace, meter))
        elif not plan.skip:
            own = [block for block in blocks_of(model, plan) if any(True for _ in block.module.parameters())]
            for name in plan.blocks:
                blocks = [block.module for block in own if block.list_name == name]
                for block in blocks[ENDS : len(blocks) - ENDS]:
                    stack.enter_context(_counted(block, name, last, trace, meter))
        yield


@contextmanager
def _counted(module: nn.Module, name: str, last: dict[Any, Seen], trace: Trace, meter: LiveMemory) -> Iterator[None]:
    """Context in which a module records its result for later modules, or reuses the result of an earlier one."""
    original = module.forward

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Any:
        key = name, _kind(module, args, kwargs)
        seen = last.get(key)
        if seen:
            trace.events.append((seen.events, 1))
            if seen.storage is not None:
                meter.grow(seen.storage, seen.left)
            like = next(x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor))
            return tree_map_only(_Shape, lambda x: like.new_empty(x.sizes, dtype=x.dtype), seen.output)
        before, alive, start = meter.live, meter.alive(), len(trace.events)
        output = original(*args, **kwargs)
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)}
        made = {x.untyped_storage()._cdata: x.untyped_storage() for x in tree_leaves(output) if isinstance(x, Tensor)}
        fresh = sum(storage.nbytes() for key, storage in made.items() if key not in given)
        shapes = tree_map_only(Tensor, lambda x: _Shape(x.shape, x.dtype), output)
        left = {key: size for key, size in meter.alive().items() if key not in alive and key not in made}
        storage = max(left, key=left.get, default=None)
        last[key] = Seen(trace.events[start:], shapes, max(0, meter.live - before - fresh), storage)
        return output

    with replaced(module, "forward", forward):
        yield


def _kind(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
    shapes = tuple(tuple(x.shape) if isinstance(x, Tensor) else type(x) for x in tree_leaves((args, kwargs)))
    return type(module), tuple(tuple(x.shape) for x in module.parameters()), shapes
