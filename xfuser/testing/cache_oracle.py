"""The semantics of caches on patches, in one process: every patch of ``oracle.displaced`` decides for itself."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from xfuser.core.hooks import Binder, replaced
from xfuser.models.plan import blocks_of


class Cache:
    """A cache by another mechanism than the engine's: all blocks of a patch's forward, or all but the first, are left
    out while a sum of changes is small.

    Attributes:
        skipped: whether blocks were left out, by the step, the number of the call, and the patch.
    """

    def __init__(self, threshold: float, coefficients: list[float] | None = None, steps: int = 0) -> None:
        self.threshold, self.coefficients, self.steps = threshold, coefficients, steps  # First-Block-Cache without them
        self.skipped: dict[tuple[int, int, int], bool] = {}
        self.kept: dict[Any, dict[str, Any]] = {}

    @contextmanager
    def skipping(self, state: Any) -> Iterator[None]:
        """Within the context, blocks of the state's model may be left out."""
        self.state, self.blocks = state, blocks_of(state.model, state.plan)
        with ExitStack() as stack:
            for number, block in enumerate(self.blocks):
                run = partial(self._run, number, block.module, block.module.forward, Binder(block.module.forward))
                stack.enter_context(replaced(block.module, "forward", run))
            yield

    def _run(self, number: int, block: nn.Module, original: Any, bind: Binder, *args: Any, **kwargs: Any) -> Any:
        """The output of a block, run or left out."""
        state, given = self.state, bind(args, kwargs)
        whole = state.patch is None or state.patches == 1
        kept = self.kept.setdefault((state.call, None if whole else state.patch), {"total": 0.0})
        carriers = state.plan.carriers(self.blocks[number].list_name)
        order = [next(name for name, streams in carriers.items() if streams == one) for one in self._outputs(number)]
        passed, output = [given[name] for name in order], None
        if number == 0:
            image = given[state.plan.image]
            if self.coefficients is None:
                output = original(**given)
                passed = _listed(output)
                signal = passed[order.index(state.plan.image)] - image
            else:
                signal = block.norm1(image, emb=given["temb"])[0]
            self.skips = self._decides(kept, signal if whole else signal[:, state.own[state.patch]])
            self.skipped[state.step, state.call, state.patch or 0] = self.skips
            kept["begin"] = passed
        if self.skips:
            passed = [x + y for x, y in zip(passed, kept["added"], strict=True)] if number == 0 else passed
            return tuple(passed) if len(passed) > 1 else passed[0]
        output = original(**given) if output is None else output
        if number == len(self.blocks) - 1:
            kept["added"] = [x - y for x, y in zip(_listed(output), kept["begin"], strict=True)]
        return output

    def _outputs(self, number: int) -> list[tuple[str, ...]]:
        return self.state.plan.outputs(self.blocks[number].list_name)

    def _decides(self, kept: dict[str, Any], signal: torch.Tensor) -> bool:
        before = kept.get("signal")
        change = None if before is None else ((signal - before).abs().mean() / before.abs().mean()).item()
        if self.coefficients is None:
            skips = change is not None and change <= self.threshold
            kept["signal"] = before if skips else signal
            return skips
        kept["signal"] = signal
        last = self.state.step == self.steps - 1
        kept["total"] += 0.0 if change is None else float(np.polyval(self.coefficients, change))
        skips = change is not None and not last and kept["total"] < self.threshold
        kept["total"] *= skips
        return skips


def _listed(output: Any) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else list(output)
