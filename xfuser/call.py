"""The state of one wrapped call: its current step, and what methods register for its duration.

A *step* is one entry of the scheduler's timesteps. PipeFusion divides it into M *sub-steps*, one for each patch; with
all other methods a step has one sub-step. Within a sub-step the pipeline calls its transformer once or several times.

Methods read the current step from this state, put wrappers around the transformer's forward, enter contexts that end
with the call, and register callbacks for the end of a sub-step's forwards and for a new schedule. No method counts
steps itself.
"""

import functools
from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack
from types import MethodType
from typing import Any, Protocol

from torch import Tensor, nn

from xfuser.core.hooks import Arguments, by_name, replaced

Forward = Callable[[Arguments], Any]
Wrapper = Callable[[Forward, Arguments], Any]  # may call the forward with the arguments, or skip it


class Arriving(Protocol):
    """An output of the transformer that another rank computes and that has not been received yet."""

    def then(self, action: Callable[[], None], results: list[Tensor]) -> None:
        """Call ``action``, which computes ``results`` from the output, once the output has arrived."""


class CallState(ExitStack):
    """The progress of one wrapped call, and the stack of the contexts that methods enter for its duration.

    Args:
        patches: M, the number of patches.
        synchronous: number of warm-up steps: the first steps of each transformer, which compute the whole image with
            fresh activations; at least one.
        compiled: whether blocks run compiled code, which cannot be hooked.

    Attributes:
        step, patch: the current sub-step.
        index: the current or last call of the transformer within the sub-step; -1 before the first call.
        steps: number of steps; 0 while it is not known.
        tokens: how the ranks share the tokens of the current forward; None outside its blocks.
        arriving: the output of the last forward, if another rank computes it.
        gives: whether this rank contributes rows to the forward's output; if not, another rank computes the same rows.
        every_step_whole: whether every rank needs the whole latents after each step.
        skips: whether the forward skips blocks, as decided by its first stage; None if no cache may skip them.
        apart: whether this forward computes one guidance branch while other ranks compute the other branch.
    """

    def __init__(self, patches: int = 1, synchronous: int = 1, compiled: bool = False) -> None:
        super().__init__()
        self.patches, self.steps, self.compiled = patches, 0, compiled
        self.step = self.patch = 0
        self.index = -1
        self.tokens: Any = None
        self.arriving: Arriving | None = None
        self.gives, self.apart = True, False
        self.skips: bool | None = None
        self.every_step_whole, self._synchronous = True, max(1, synchronous)
        self._starts = {0}  # steps in which a transformer is called for the first time
        self._part: Callable[[Any], Any] | None = None
        self._wrappers: dict[nn.Module, list[Wrapper]] = {}
        self._at_forwards_end: list[Callable[[], None]] = []
        self._at_schedule: list[Callable[[], None]] = []

    # Registered by methods.

    def around(self, model: nn.Module, wrapper: Wrapper) -> None:
        """Run ``wrapper`` around the forward of a transformer, inside the wrappers registered before.

        Raises:
            RuntimeError: the transformer is already in a wrapped call.
        """
        if hasattr(model.forward, "call_state"):
            raise RuntimeError(f"{type(model).__name__} runs in parallel already: active() and calls do not nest")
        self._wrappers.setdefault(model, []).append(wrapper)

    def at_forwards_end(self, action: Callable[[], None]) -> None:
        """Call ``action`` after the forwards of a sub-step, before the scheduler's step."""
        self._at_forwards_end.append(action)

    def at_schedule(self, action: Callable[[], None]) -> None:
        """Call ``action`` before a new schedule is made: the next step is then the first step of another image."""
        self._at_schedule.append(action)

    def computes(self, part: Callable[[Any], Any]) -> None:
        """Set ``part``, which returns views of the part of an output that this rank computes in a sub-step."""
        self._part = part

    # Read by methods.

    def part(self, output: Any) -> Any:
        """The part of an output, or of each tensor in it, that this rank computes in this sub-step."""
        return output if self._part is None else self._part(output)

    def when_there(self, action: Callable[[], None], results: list[Tensor]) -> None:
        """Call ``action``, which computes ``results`` from the last forward's output, once that output has arrived."""
        if self.arriving is None:
            action()
        else:
            self.arriving.then(action, results)

    @property
    def synchronous(self) -> bool:
        """Whether this step computes the whole image with fresh activations, in its first sub-step."""
        return self._is_synchronous(self.step)

    def _is_synchronous(self, step: int) -> bool:
        return any(first <= step < first + self._synchronous for first in self._starts)

    @property
    def ends_step(self) -> bool:
        """Whether this is the last sub-step of its step."""
        return self.patch == self.patches - 1

    def ends_whole(self, step: int) -> bool:
        """Whether every rank has the whole latents at the end of this step; if not, its patches are sent one by one."""
        synchronous = self._is_synchronous(step) or self._is_synchronous(step + 1)
        return synchronous or self.every_step_whole or step >= self.steps - 1

    @property
    def whole(self) -> bool:
        """Whether every rank has the whole latents now, before the current sub-step."""
        return self.patch == 0 and (self.step == 0 or self.ends_whole(self.step - 1))

    def after(self, step: int, patch: int) -> tuple[int, int] | None:
        """The sub-step after this one, if it starts as soon as its patch arrives; None otherwise."""
        if patch < self.patches - 1:
            return None if self._is_synchronous(step) else (step, patch + 1)
        return None if self.ends_whole(step) else (step + 1, 0)

    def extend(self, synchronous: int) -> None:
        """Make at least this many first steps of each transformer synchronous."""
        self._synchronous = max(self._synchronous, synchronous)

    # Progress.

    def announce(self, steps: int, order: int) -> None:
        """Set the number of steps of a schedule; ``order`` of them make one inference step.

        Raises:
            ValueError: the schedule has fewer steps than must be synchronous.
        """
        if self._synchronous >= steps + order:
            raise ValueError(
                f"warmup_steps={self._synchronous // order} is more than the {-(-steps // order)} steps of this call:"
                " use at most that many"
            )
        self.begin(steps)

    def begin(self, steps: int) -> None:
        """Start at the first of this many steps."""
        self.step = self.patch = 0
        self.steps, self._starts = steps, {0}

    def start(self, step: int) -> None:
        """Note that a transformer is first called in this step, so that synchronous steps start here."""
        self._starts.add(step)

    def wrap(self, scheduler: Any) -> None:
        """Until the call ends, the transformers run inside their wrappers, and the scheduler advances this state."""
        if scheduler is not None and self._wrappers:
            step = self._around(scheduler, "step", self._end_forwards, self._advance)
            self.enter_context(replaced(scheduler, "step", step))
            set_timesteps = self._around(scheduler, "set_timesteps", self._restart)
            self.enter_context(replaced(scheduler, "set_timesteps", set_timesteps))
        for model, wrappers in self._wrappers.items():
            self.enter_context(self._wrapped(model, wrappers))

    def _wrapped(self, model: nn.Module, wrappers: list[Wrapper]) -> AbstractContextManager[None]:
        original = model.forward

        def innermost(arguments: Arguments) -> Any:
            return self.part(original(**arguments))

        wrapped: Forward = innermost
        for wrapper in reversed(wrappers):
            wrapped = functools.partial(wrapper, wrapped)

        def counted(arguments: Arguments) -> Any:
            self.index += 1
            try:
                return wrapped(arguments)
            finally:
                self.tokens, self.gives, self.apart = None, True, False

        forward = by_name(original, counted)
        forward.call_state = self
        return replaced(model, "forward", forward)

    def _around(
        self, scheduler: Any, name: str, before: Callable[[], None], after: Callable[[], None] | None = None
    ) -> MethodType:
        """A scheduler's method with actions around it; in copies of the scheduler, it acts on the copy."""
        original, of_class = getattr(scheduler, name), getattr(type(scheduler), name)

        @functools.wraps(of_class)
        def noticed(own: Any, *args: Any, **kwargs: Any) -> Any:
            before()
            result = original(*args, **kwargs) if own is scheduler else of_class(own, *args, **kwargs)
            if after:
                after()
            return result

        return MethodType(noticed, scheduler)

    def _restart(self) -> None:
        for action in self._at_schedule:
            action()
        self.begin(0)
        self.index = -1

    def _end_forwards(self) -> None:
        for action in self._at_forwards_end:
            action()

    def _advance(self) -> None:
        """Go to the next sub-step. Without patches, ignore steps with no forward: they are of other latents (sound)."""
        if self.index < 0 and self.patches == 1:
            return
        self.index, self.patch = -1, self.patch + 1
        if self.patch == self.patches:
            self.step, self.patch = self.step + 1, 0
