"""A ControlNet under PipeFusion: displaced as the transformer is, on every stage."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any

from torch import nn

from xfuser.call import CallState
from xfuser.core.distributed import SequenceParallelGroupCoordinator
from xfuser.core.hooks import replaced
from xfuser.methods.pipefusion.pipefusion import PipeFusion
from xfuser.methods.sequence import SequenceParallel
from xfuser.models.plan import ModelPlan
from xfuser.models.registry import controlnets_of


def control_methods(
    pipe: Any, group: SequenceParallelGroupCoordinator, backend: str, pipefusion: PipeFusion | None
) -> list["ControlNet"]:
    """What lets a pipeline's ControlNets compute patches; other methods run them whole."""
    return [ControlNet(*net, group, backend, pipefusion) for net in controlnets_of(pipe)] if pipefusion else []


class ControlNet(SequenceParallel):
    """A ControlNet whose forward computes the patch of the sub-step: its residuals are those of the patch's tokens.

    All blocks are on every stage, and so are, for their sake, the latents of the patch; nothing is sent for it but
    those. Each sequence-parallel rank computes the whole patch, of which the transformer takes a share.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: ModelPlan,
        group: SequenceParallelGroupCoordinator,
        backend: str,
        pipefusion: PipeFusion,
    ) -> None:
        super().__init__(model, plan, group, backend, pipefusion)
        self._outputs: list[Any] = []  # of each call of the synchronous step
        self._begin()

    def _begin(self) -> None:
        """Count the calls of a sub-step anew."""
        self._calls, self._attended = 0, {}

    def _reset(self) -> None:
        """Clear the state of one forward; attention is counted over all forwards of a sub-step."""
        self._unit, self._lines, self._early, self._cuts = 1, 1, False, {}

    @contextmanager
    def enter(self, call: CallState) -> Iterator[None]:
        """Within the context, the ControlNet's forward computes patches."""
        self._call = call
        call.at_forwards_end(self._begin)
        with replaced(self._model, "forward", self._patchwise(self._model.forward)), self._hooked():
            yield

    def _patchwise(self, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            call, number = self._call, self._calls
            self._calls += 1
            if call.synchronous and call.patch > 0:  # the transformer does not run
                return self._outputs[number]
            try:
                output = original(*args, **kwargs)
            finally:
                call.tokens = None
                self._reset()
            self._outputs[number:] = [output] if call.synchronous else []
            return output

        return forward

    def _splits(self, tokens: int) -> bool:
        return False
