"""Further stacks of blocks under PipeFusion, displaced as the transformer's own: ControlNets, refiners ahead of it."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import wraps
from typing import Any

from torch import Tensor, nn

from xfuser.call import CallState
from xfuser.core.distributed import SequenceParallelGroupCoordinator
from xfuser.core.hooks import Binder, replaced
from xfuser.methods.pipefusion.pipefusion import PipeFusion
from xfuser.methods.sequence import SequenceParallel
from xfuser.models.plan import ModelPlan, Streams, blocks_of
from xfuser.models.registry import controlnets_of


def stacks_of(
    pipe: Any,
    models: Iterable[tuple[nn.Module, ModelPlan]],
    group: SequenceParallelGroupCoordinator,
    backend: str,
    pipefusion: PipeFusion | None,
) -> list[SequenceParallel]:
    """What lets a pipeline's further stacks of blocks compute patches; other methods run them whole."""
    if not pipefusion:
        return []
    shared = group, backend, pipefusion
    ahead = [
        (model, replace(plan, blocks=plan.ahead, head=None, text_first=None, residuals=()))
        for model, plan in models
        if plan.ahead
    ]
    return [*(Refiner(*one, *shared) for one in ahead), *(ControlNet(*net, *shared) for net in controlnets_of(pipe))]


class Stack(SequenceParallel):
    """Blocks beside a transformer's own, of which each sequence-parallel rank computes the whole patch."""

    def _splits(self, tokens: int) -> bool:
        return False


class Refiner(Stack):
    """The blocks ahead of a transformer's own: the first stage runs them on the patch; others, on nothing."""

    @contextmanager
    def enter(self, call: CallState) -> Iterator[None]:
        """Within the context, the blocks compute patches, or return what they are given."""
        if self._pipefusion.stage_of(self._model).number == 0:
            with super().enter(call):
                yield
            return
        with ExitStack() as stack:
            for block in blocks_of(self._model, self._plan):
                stack.enter_context(replaced(block.module, "forward", self._passing(Binder(block.module.forward))))
            yield

    def _passing(self, bind: Binder) -> Callable[..., Any]:
        return lambda *args, **kwargs: bind(args, kwargs)[self._plan.image]

    def _leave_blocks(self, outputs: list[Streams], block: nn.Module, args: tuple, output: Tensor) -> Tensor:
        """Behind the last block: all tokens, with zeros in the place of other patches'."""
        shares, self._call.tokens = self._call.tokens, None
        return shares.rows(outputs[0], output.shape[1]).in_sequence(output)


class ControlNet(Stack):
    """A ControlNet whose forward computes the patch of the sub-step: its residuals are those of the patch's tokens.

    All blocks are on every stage, and so are, for their sake, the latents of the patch; nothing is sent for it but
    those. Of a rank's patch, the transformer takes a share.
    """

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._outputs: list[Any] = []  # of each call of the synchronous step
        self._unit = self._lines = 1
        self._begin()

    def _begin(self) -> None:
        """Count the calls of a sub-step anew."""
        self._calls, self._attended = 0, {}

    def _reset(self) -> None:
        """Clear the state of one forward; attention is counted over all forwards of a sub-step."""
        attended = vars(self).get("_attended", {})
        super()._reset()
        self._attended, self._early = attended, False  # whoever calls it gets the patch's tokens

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
