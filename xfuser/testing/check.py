"""Check that a plan fits its model: compare serial and parallel forwards module by module."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from xfuser.config import xFuserArgs
from xfuser.core.distributed import GroupCoordinator
from xfuser.methods import sequence
from xfuser.methods.tokens import Rows, TokenShares
from xfuser.models.plan import ModelPlan, Streams
from xfuser.models.registry import plan_of, set_plan
from xfuser.parallel import Loop, xDiTParallel
from xfuser.testing.ranks import RankPool

Outputs = list[tuple[str, torch.Tensor]]  # name and output of each module call, in the order of completion


@dataclass(frozen=True)
class PlanCheck:
    """The result of :func:`check_plan`.

    Attributes:
        error: max|a - b| / max|b| of the model's outputs.
        first: name of the first module with a different output; None if no comparable module has one.
        first_error: the error of that module.
    """

    error: float
    first: str | None
    first_error: float
    tolerance: float

    @property
    def fits(self) -> bool:
        """Whether the error is within the tolerance."""
        return self.error <= self.tolerance

    def __str__(self) -> str:
        if self.fits:
            return f"the plan fits: relative error {self.error:.1e}"
        where = f"; the first module that differs is {self.first} ({self.first_error:.1e})" if self.first else ""
        return f"the plan does not fit: relative error {self.error:.1e}{where}"


def check_plan(
    model: nn.Module, inputs: dict[str, Any], world: int = 2, plan: ModelPlan | None = None, tolerance: float = 1e-4
) -> PlanCheck:
    """Compare a model's forward in this process with forwards on ``world`` CPU ranks under Ulysses and the ring.

    Call it under ``if __name__ == "__main__":``, as the ranks are processes that import the script. Choose inputs with
    odd token counts, and with different counts of image and text tokens.

    Args:
        model: the model; other processes must be able to import its class.
        inputs: arguments of its forward, by name.
        plan: the plan to check; the default is the plan of the model's class.

    Raises:
        ValueError: there is no plan, or the parallel forward fails.
    """
    plan = plan or plan_of(model)
    if plan is None:
        raise ValueError(f"there is no plan for {type(model).__name__}: pass one, or register it with register_plan()")
    with torch.no_grad(), _recorded(model) as expected:
        whole = tree_leaves(model(**inputs))
    pool = RankPool(world)
    found = []
    try:
        for method in ("ulysses_degree", "ring_degree"):
            found += pool.run(world, _compared, model, plan, inputs, {method: world}, whole, expected, tolerance)
    except RuntimeError as error:
        reason = str(error).split("\nrank 1:")[0].strip().splitlines()[-1]
        raise ValueError(f"the parallel forward of {type(model).__name__} failed: {reason}") from error
    finally:
        pool.close()
    worst = max(found, key=lambda one: one[0])
    return PlanCheck(*worst, tolerance)


def _compared(
    model: nn.Module,
    plan: ModelPlan,
    inputs: dict[str, Any],
    degrees: dict[str, int],
    whole: list[torch.Tensor],
    expected: Outputs,
    tolerance: float,
) -> tuple[float, str | None, float]:
    """On one rank: return the error of the outputs, and the first module that differs with its error."""
    set_plan(model, plan)
    parallel = xDiTParallel(Loop(model, None), xFuserArgs(**degrees).create_config()[0])
    with torch.no_grad(), _shares_kept() as shares, parallel.active(), _recorded(model) as outputs:
        result = tree_leaves(model(**inputs))
    first, first_error = None, 0.0
    for (name, own), (_, reference) in zip(outputs, expected, strict=False):
        errors = [_error(x, reference) for x in _assembled(own, reference, shares[0], parallel._sp)]
        if first is None and errors and min(errors) > tolerance:
            first, first_error = name, min(errors)
    return max(_error(a, b) for a, b in zip(result, whole, strict=True)), first, first_error


def _assembled(
    own: torch.Tensor, reference: torch.Tensor, shares: TokenShares, group: GroupCoordinator
) -> Iterator[torch.Tensor]:
    """Gather ``own`` along dimension 1 in every layout that its length allows, and yield the full tensors."""
    shapes = group.all_gather_object(own.shape)
    if all(shape == reference.shape for shape in shapes):
        yield own
        return
    lengths = [shape[1] if len(shape) == reference.dim() > 2 else -1 for shape in shapes]
    for streams in (("image",), ("text",), ("text", "image"), ("image", "text")):
        rows = _rows(shares, streams, own.shape[1]) if shares.total(streams) == reference.shape[1] else None
        if rows is None or rows.lengths != lengths:
            continue
        yield rows.in_sequence(group.all_gather(rows.given(own, 1, shares.rank), dim=1, sizes=rows.key_lengths))


def _rows(shares: TokenShares, streams: Streams, own: int) -> Rows | None:
    try:
        return shares.rows(streams, own)
    except ValueError:
        return None


@contextmanager
def _recorded(model: nn.Module) -> Iterator[Outputs]:
    """Within the context, record the first output tensor of each module call of a model."""
    outputs: Outputs = []

    def note(name: str, output: Any) -> None:
        tensors = [x for x in tree_leaves(output) if isinstance(x, torch.Tensor)]
        if tensors:
            outputs.append((name, tensors[0].detach().clone()))

    with ExitStack() as stack:
        for name, module in model.named_modules():
            hook = module.register_forward_hook(lambda m, args, out, name=name: note(name, out))
            stack.callback(hook.remove)
        yield outputs


@contextmanager
def _shares_kept() -> Iterator[list[Any]]:
    """Within the context, record the token shares of each forward."""
    kept: list[Any] = []
    share = sequence.SequenceParallel._share

    def noted(self: Any, *args: Any) -> Any:
        kept.append(share(self, *args))
        return kept[-1]

    sequence.SequenceParallel._share = noted
    try:
        yield kept
    finally:
        sequence.SequenceParallel._share = share


def _error(a: torch.Tensor, b: torch.Tensor) -> float:
    return ((a.double() - b).abs().max() / b.abs().max().clamp_min(1e-12)).item()
