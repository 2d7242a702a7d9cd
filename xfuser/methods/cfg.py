"""Classifier-free guidance (CFG) parallelism: the conditional and unconditional branches run on different ranks.

Pipelines run the two branches in one of two ways. *Batched*: one transformer call with both branches in its batch; the
batch is split. *Sequential*: two calls per step; one rank computes the first while the other computes the second.
Step 0 runs without pairing the calls, and shows which of the two ways the pipeline uses.
"""

from collections.abc import Callable, Iterable
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from xfuser.call import CallState, Forward
from xfuser.core.distributed import GroupCoordinator
from xfuser.core.hooks import Arguments
from xfuser.core.logger import logger
from xfuser.methods.batch import gather_rows, rows_of, split_batch
from xfuser.methods.perturbed import Perturbed
from xfuser.models.plan import ModelPlan


class GuidanceParallel:
    """CFG parallelism over one group, during one call of a pipeline.

    Args:
        models: the pipeline's transformers with their plans.
        entries_stay: whether state that ranks keep between steps ties each batch entry to its rank.
        pipe: the pipeline.
    """

    def __init__(
        self, group: GroupCoordinator, models: Iterable[tuple[nn.Module, ModelPlan]], entries_stay: bool, pipe: Any
    ) -> None:
        self._group, self._models, self._entries_stay, self._pipe = group, models, entries_stay, pipe
        self._first_step: list[tuple[int, Any, Any]] | None = []  # of each call: batch size, input shapes, blank output
        self._paired: Any = None  # blank output of a call, once calls are known to come in pairs
        self._shapes: Any = None  # of the latents of those calls
        self._pending: _Sent | _Promise | None = None

    def enter(self, call: CallState) -> None:
        """During the call, the branches of its forwards are computed on different ranks."""
        self._call = call
        for model, plan in self._models:
            call.around(model, partial(self._wrapper, plan, Perturbed(self._pipe, model)))
        call.at_forwards_end(self._end_forwards)
        call.callback(self._settle)  # no transfer may still be in flight in the next call

    def _wrapper(self, plan: ModelPlan, perturbed: Perturbed, forward: Forward, arguments: Arguments) -> Any:
        index, latents = self._call.index, arguments[plan.latents]
        if self._paired is not None and index < 2 and _shapes(latents) == self._shapes:
            self._call.apart = index == 0 or self._pending is not None
            if index == 0:
                return self._first_call(forward, arguments)
            if self._call.apart:
                return self._second_call(forward, arguments)
        self._settle()
        if perturbed.branches > 1:
            return self._perturbed(plan, perturbed, forward, arguments)
        output = split_batch(self._group, len(latents), forward, arguments, plan, self._call)
        if self._first_step is not None:
            self._first_step.append((len(latents), _shapes(latents), _blank(output)))
        return output

    def _perturbed(self, plan: ModelPlan, perturbed: Perturbed, forward: Forward, arguments: Arguments) -> Any:
        """Split three branches: rank 0 gives the unconditional branch, rank 1 the other two.

        Both ranks compute the perturbed branch with one other: a processor for a single branch may compute attention
        differently from the pipeline's.
        """
        batch, rank = len(arguments[plan.latents]), self._group.rank_in_group
        is_first, self._first_step = self._first_step is not None, None
        if perturbed.branches == 2:
            if is_first:
                self._warn_of_nothing("has perturbed-attention guidance without classifier-free guidance")
            return forward(arguments)
        third = batch // 3
        ranges = [range(rank * third, rank * third + third), range(2 * third, batch)]
        with perturbed.in_two():
            output = forward(rows_of(arguments, batch, ranges, plan))
        return gather_rows(self._group, output, [third, 2 * third])

    def _warn_of_nothing(self, why: str) -> None:
        logger.warning(
            "CFG parallelism has nothing to split: this call %s, so the %d ranks of a CFG group all compute the same."
            " Use them for another method.",
            why, self._group.world_size,
        )  # fmt: skip

    def _end_forwards(self) -> None:
        self._settle()  # a single call, such as outside the guidance interval
        if self._first_step:
            self._learn(self._first_step)
            self._first_step = None

    def _settle(self) -> None:
        pending = self._await(None)
        if pending is not None:
            pending.settle()

    def _await(self, pending: "_Sent | _Promise | None") -> "_Sent | _Promise | None":
        """Set the pending transfer; returns the previous one."""
        before, self._pending = self._pending, pending
        self._call.arriving = pending if isinstance(pending, _Promise) else None
        return before

    def _learn(self, calls: list[tuple[int, Any, Any]]) -> None:
        (batch, shapes, output), others = calls[0], calls[1:]
        if not others and batch == 1:
            self._warn_of_nothing("runs no classifier-free guidance")
        alike = len(others) == 1 and others[0][1] == shapes and _shapes(others[0][2]) == _shapes(output)
        # An even batch is split just as well. Entries that stay are already split by step 0 if there are several.
        uneven = batch == 1 if self._entries_stay else batch % 2
        if alike and uneven and self._group.world_size == 2:
            self._paired, self._shapes = output, shapes

    def _blank_output(self) -> Any:
        return _blank(self._call.part(self._paired))

    def _first_call(self, forward: Forward, arguments: Arguments) -> Any:
        """Rank 0 computes and sends; rank 1 returns a promised output, and continues to the second call at once."""
        if self._group.rank_in_group == 0:
            output = forward(arguments)
            self._await(_Sent(output, self._group))
        else:
            output = self._blank_output()
            promise = _Promise(output, self._group)
            promise.guard()
            self._await(promise)
        return output

    def _second_call(self, forward: Forward, arguments: Arguments) -> Any:
        """Rank 1 computes and sends; rank 0 receives the output instead of computing it."""
        first = self._await(None)
        if isinstance(first, _Promise):
            first.release(arguments)
            output = forward(arguments)
            _Sent(output, self._group).settle()
        else:
            output = self._blank_output()
            _Promise(output, self._group).settle()
        first.settle()
        return output


class _Sent:
    """A copy of an output that is being sent to the other rank."""

    def __init__(self, output: Any, group: GroupCoordinator) -> None:
        self._copies = [x.clone(memory_format=torch.contiguous_format) for x in tree_leaves(output)]
        self._works = [group.isend(x) for x in self._copies if x.numel()]

    def settle(self) -> None:
        """Wait until the copies can be freed. On NCCL the compute stream, which reuses their memory, waits."""
        for work in self._works:
            work.wait()


class _Promise:
    """An output whose tensors the other rank fills while this rank computes something else.

    A pipeline can take views of the tensors without waiting. If it reads them early, the guard waits for the data
    first, which is slower but correct.
    """

    def __init__(self, output: Any, group: GroupCoordinator) -> None:
        self._tensors = tree_leaves(output)
        self._works: list[dist.Work] = [group.irecv(x) for x in self._tensors if x.numel()]
        self._actions: list[Callable[[], None]] = []
        self._guard: _ReadGuard | None = None

    def then(self, action: Callable[[], None], results: list[Tensor]) -> None:
        """Call ``action`` when the tensors are filled; reading its ``results`` also waits for them."""
        self._actions.append(action)
        self._guard.watch(results)

    def guard(self) -> None:
        """From now on, reading the tensors waits for them."""
        self._guard = _ReadGuard(self._tensors, self._wait)
        self._guard.__enter__()

    def release(self, arguments: Arguments | None = None) -> None:
        """End the guard; first wait for the tensors if these arguments share their memory."""
        if self._guard is not None:
            if self._guard.concerns(arguments):
                self._wait()
            self._guard.__exit__(None, None, None)
            self._guard = None

    def settle(self) -> None:
        self.release()
        self._wait()

    def _wait(self) -> None:
        works, self._works = self._works, []
        for work in works:
            work.wait()  # on NCCL the compute stream waits: kernels queued from here on read received data
        actions, self._actions = self._actions, []
        for action in actions:
            action()


class _ReadGuard(TorchDispatchMode):
    """Calls ``before_read`` before every operation, except views, on memory of the given tensors."""

    def __init__(self, tensors: list[Tensor], before_read: Callable[[], None]) -> None:
        super().__init__()
        self._memory: set[int] = set()
        self.watch(tensors)
        self._before_read = before_read

    def watch(self, tensors: list[Tensor]) -> None:
        self._memory |= {x.untyped_storage()._cdata for x in tensors if x.numel()}

    def concerns(self, tree: Any) -> bool:
        return any(isinstance(x, Tensor) and x.untyped_storage()._cdata in self._memory for x in tree_leaves(tree))

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        if not func.is_view and self.concerns((args, kwargs)):
            self._before_read()
        return func(*args, **(kwargs or {}))


def _blank(output: Any) -> Any:
    """Uninitialised contiguous tensors in the shapes of an output."""
    return tree_map_only(Tensor, lambda x: torch.empty(x.shape, dtype=x.dtype, device=x.device), output)


def _shapes(output: Any) -> list[tuple[torch.Size, torch.dtype]]:
    return [(x.shape, x.dtype) for x in tree_leaves(output)]
