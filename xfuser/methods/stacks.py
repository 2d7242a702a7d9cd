"""Further stacks of blocks that PipeFusion computes patch by patch: ControlNets, and refiners before a transformer."""

from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import wraps
from operator import itemgetter
from typing import Any

from torch import Tensor, nn

from xfuser.call import CallState
from xfuser.core.distributed import SequenceParallelGroupCoordinator
from xfuser.core.hooks import by_name, replaced
from xfuser.methods.pipefusion.pipefusion import PipeFusion
from xfuser.methods.sequence import SequenceParallel
from xfuser.models.plan import ModelPlan, Streams, blocks_of
from xfuser.models.registry import controlnets_of


def stacks_of(
    pipe: Any,
    models: Iterable[tuple[nn.Module, ModelPlan]],
    group: SequenceParallelGroupCoordinator,
    backend: str,
    pipefusion: PipeFusion,
) -> list[SequenceParallel]:
    """The methods that let a pipeline's further stacks of blocks compute patches; other methods run them whole."""
    shared = group, backend, pipefusion
    refiners = [Refiner(model, plan, *shared) for model, plan in models if plan.ahead]
    return [*refiners, *(ControlNet(*net, *shared) for net in controlnets_of(pipe))]


class Stack(SequenceParallel):
    """Blocks besides a transformer's own; each sequence-parallel rank computes the whole patch."""

    def _splits(self, tokens: int) -> bool:
        return False


class Refiner(Stack):
    """The blocks before a transformer's own: the first stage runs them on the patch; other stages skip them."""

    def __init__(self, model: nn.Module, plan: ModelPlan, *args: Any) -> None:
        super().__init__(model, replace(plan, blocks=plan.ahead, head=None, text_first=None, residuals=()), *args)

    def enter(self, call: CallState) -> None:
        """During the call, the blocks compute patches on the first stage, and return their input on others."""
        if self._pipefusion.stage_of(self._model).number == 0:
            super().enter(call)
            return
        for block in blocks_of(self._model, self._plan):
            passing = by_name(block.module.forward, itemgetter(self._plan.image))
            call.enter_context(replaced(block.module, "forward", passing))

    def _leave_blocks(self, outputs: list[Streams], output: Tensor) -> Tensor:
        """After the last block: return all tokens, with zeros for those of other patches."""
        shares, self._call.tokens = self._call.tokens, None
        return shares.rows(outputs[0], output.shape[1]).in_sequence(output)


class ControlNet(Stack):
    """A ControlNet whose forward computes the patch of the sub-step: its residuals are those of the patch's tokens.

    Every stage holds all of its blocks and, for them, the latents of the patch; only these latents are sent for it. The
    transformer cuts the residuals to each rank's share of the patch.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._outputs: list[Any] = []  # of each call in the synchronous step
        self._unit = self._lines = 1
        self._begin()

    def _begin(self) -> None:
        """Restart the count of calls in a sub-step."""
        self._calls, self._attended = 0, {}

    def _reset(self) -> None:
        """Clear the state of one forward; attention is counted over all forwards of a sub-step."""
        attended = vars(self).get("_attended", {})
        super()._reset()
        self._attended, self._early = attended, False  # the caller gets the patch's tokens

    def enter(self, call: CallState) -> None:
        """During the call, the ControlNet's forward computes patches."""
        self._call = call
        call.at_forwards_end(self._begin)
        call.enter_context(replaced(self._model, "forward", self._patchwise(self._model.forward)))
        self._hook()

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
