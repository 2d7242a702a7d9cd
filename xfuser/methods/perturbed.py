"""Perturbed-attention guidance (PAG, arXiv 2403.17377) of Diffusers' pipelines, whose batch has a further branch.

In chosen layers, a pipeline sets an attention processor that cuts the batch into its branches, and in the last one lets
tokens attend to themselves alone. It has two of them: for the unconditional, the conditional and the perturbed branch,
and for the latter two.
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
        """The branches into which the model's processors now cut a batch; 1 where none does."""
        numbers = zip((3, 2), self._processors, strict=False)
        return next((number for number, one in numbers if any(m.processor is one for m in self._modules)), 1)

    @contextmanager
    def in_two(self) -> Iterator[None]:
        """Within the context, layers that cut the batch into three branches cut it into two, of which one is
        perturbed."""
        three, two = self._processors
        with ExitStack() as stack:
            for module in [one for one in self._modules if one.processor is three]:
                stack.enter_context(replaced(module, "processor", two))
            yield
