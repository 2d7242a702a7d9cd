"""Perturbed-attention guidance (PAG, arXiv 2403.17377) in Diffusers pipelines, whose batch has one more branch.

In chosen layers, a pipeline sets an attention processor that splits the batch into its branches, and lets each token of
the last branch attend only to itself. It has two such processors: one for the unconditional, conditional and perturbed
branches, and one for the last two of these.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from xfuser.core.hooks import replaced


class Perturbed:
    """The branches of one model's batch during a call of its pipeline.

    Args:
        pipe: the pipeline, with PAG or without.
        model: its transformer or U-Net.
    """

    def __init__(self, pipe: Any, model: nn.Module) -> None:
        self._processors: tuple[Any, ...] = getattr(pipe, "_pag_attn_processors", None) or ()
        self._modules = [one for one in model.modules() if hasattr(one, "processor")] if self._processors else []

    @property
    def branches(self) -> int:
        """Number of branches into which the model's current processors split a batch; 1 if none does."""
        numbers = zip((3, 2), self._processors, strict=False)
        return next((number for number, one in numbers if any(m.processor is one for m in self._modules)), 1)

    @contextmanager
    def in_two(self) -> Iterator[None]:
        """Within the context, layers that split the batch into three branches split it into two, the last perturbed."""
        three, two = self._processors
        with ExitStack() as stack:
            for module in [one for one in self._modules if one.processor is three]:
                stack.enter_context(replaced(module, "processor", two))
            yield
