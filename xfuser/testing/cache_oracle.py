"""Reference semantics of caches on parts of an image, in one process.

Each patch of ``oracle.displaced`` decides separately; the parts of ``oracle.distrifusion`` decide together.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import nn

from xfuser.core.hooks import Binder, replaced
from xfuser.models.plan import blocks_of


class Cache:
    """A cache that skips all blocks of a patch's forward, or all but the first, while a sum of changes is small.

    Its mechanism is not the engine's.

    Attributes:
        skipped: whether blocks were skipped, by step, number of the call, and patch.
    """

    def __init__(self, threshold: float, coefficients: list[float] | None = None, steps: int = 0) -> None:
        self.threshold, self.coefficients, self.steps = threshold, coefficients, steps  # None: First-Block-Cache
        self.skipped: dict[tuple[int, int, int], bool] = {}
        self.kept: dict[Any, dict[str, Any]] = {}

    @contextmanager
    def skipping(self, state: Any) -> Iterator[None]:
        """Within the context, blocks of the state's model may be skipped."""
        self.state, self.blocks = state, blocks_of(state.model, state.plan)
        with ExitStack() as stack:
            for number, block in enumerate(self.blocks):
                run = partial(self._run, number, block.module, block.module.forward, Binder(block.module.forward))
                stack.enter_context(replaced(block.module, "forward", run))
            yield

    def _run(self, number: int, block: nn.Module, original: Any, bind: Binder, *args: Any, **kwargs: Any) -> Any:
        """Run or skip a block, and return its output."""
        state, given = self.state, bind(args, kwargs)
        kept = self.kept.setdefault(self._key(), {"total": 0.0})
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
            self._decide(kept, signal)
            kept["begin"] = passed
        if self.skips:
            passed = [x + y for x, y in zip(passed, kept["added"], strict=True)] if number == 0 else passed
            return tuple(passed) if len(passed) > 1 else passed[0]
        output = original(**given) if output is None else output
        if number == len(self.blocks) - 1:
            self._keep(kept, [x - y for x, y in zip(_listed(output), kept["begin"], strict=True)])
        return output

    def _key(self) -> tuple[int, int | None]:
        """The key of the cached state: the number of the call, and the patch."""
        state = self.state
        return state.call, None if state.patch is None or state.patches == 1 else state.patch

    def _decide(self, kept: dict[str, Any], signal: torch.Tensor) -> None:
        state, whole = self.state, self._key()[1] is None
        self.skips = self._decides(kept, signal if whole else signal[:, state.own[state.patch]])
        self.skipped[state.step, state.call, state.patch or 0] = self.skips

    def _keep(self, kept: dict[str, Any], added: list[torch.Tensor]) -> None:
        kept["added"] = added

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


class JointCache(Cache):
    """The same for parts that decide together: before their forwards, the first block of each part gives its signal."""

    @contextmanager
    def skipping(self, state: Any) -> Iterator[None]:
        """Within the context, blocks of the state's model may be skipped."""
        forward = state.forward

        def deciding(original: Any, *args: Any, **kwargs: Any) -> Any:
            self.signals: list[torch.Tensor] = []
            if not state.waits():
                before = state.call, dict(state.kept), dict(state.fresh)
                self.probing = True
                forward(partial(_until_signal, original), *args, **kwargs)
                state.call, state.kept, state.fresh = before
                self._decides_for_all(self.kept[self._key()], torch.cat(self.signals, dim=1))
            self.probing = False
            return forward(original, *args, **kwargs)

        with super().skipping(state), replaced(state, "forward", deciding):
            yield

    def _key(self) -> tuple[int, int | None]:
        return self.state.call, None

    def _decide(self, kept: dict[str, Any], signal: torch.Tensor) -> None:
        if self.state.part is None:
            self._decides_for_all(kept, signal)
        elif self.probing:
            self.signals.append(signal[:, self.state.own[self.state.part]])
            raise _SignalTold

    def _decides_for_all(self, kept: dict[str, Any], signal: torch.Tensor) -> None:
        self.skips = self.skipped[self.state.step, self.state.call, 0] = self._decides(kept, signal)

    def _keep(self, kept: dict[str, Any], added: list[torch.Tensor]) -> None:
        """Keep the rows that the current part owns."""
        if self.state.part is None:
            kept["added"] = added
        else:
            for streams, x, y in zip(self._outputs(len(self.blocks) - 1), kept["added"], added, strict=True):
                own = self.state.rows(streams, x.shape[1])
                x[:, own] = y[:, own]


class _SignalTold(Exception):
    """Raised when the first block has given its signal."""


def _until_signal(original: Any, *args: Any, **kwargs: Any) -> None:
    with suppress(_SignalTold):
        original(*args, **kwargs)


def _listed(output: Any) -> list[torch.Tensor]:
    return [output] if isinstance(output, torch.Tensor) else list(output)
