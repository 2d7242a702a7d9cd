"""The state of one wrapped call: where it stands, and what methods want done at its ends.

A *step* is one entry of the scheduler's timesteps. PipeFusion divides it into M *sub-steps*, one for each patch; with
all other methods a step has one sub-step. Within a sub-step the pipeline calls its transformer once or several times.

Methods read where the call stands, put wrappers around the transformer's forward, and register what is to happen when
the forwards of a sub-step are over or a new schedule is made. None of them counts for itself.
"""

import functools
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from types import MethodType
from typing import Any, Protocol

from torch import Tensor, nn

from xfuser.core.hooks import Arguments, Binder, replaced

Forward = Callable[[Arguments], Any]
Wrapper = Callable[[Forward, Arguments], Any]  # calls the forward with the arguments, or not


class Arriving(Protocol):
    """An output of the transformer that another rank computes and that is still on its way."""

    def then(self, action: Callable[[], None], results: list[Tensor]) -> None:
        """Call ``action``, which makes ``results`` of the output, once it is there."""


class CallState:
    """Where one wrapped call stands.

    Args:
        patches: M.
        synchronous: number of first steps of each transformer that compute the whole image with fresh activations; one
            in any case.
        every_step_whole: whether every rank needs whole latents after each step.
        compiled: whether blocks run compiled code, into which nothing can hook.

    Attributes:
        step, patch: of the sub-step that is running.
        index: of the transformer's call that is running or was last, within the sub-step; -1 before the first one.
        steps: number of steps; 0 as long as it is not known.
        tokens: how the ranks share the tokens of the forward that is running; None outside of its blocks.
        arriving: the output of the last forward, where another rank computes it.
        gives: whether this rank gives rows of the forward's output; if not, another computes the same and gives them.
        skips: whether blocks of the forward are left out, as its first stage decides; None where no cache may do so.
        apart: whether the forward is of one branch of guidance, and other ranks compute the other at the same time.
    """

    def __init__(
        self, patches: int = 1, synchronous: int = 1, every_step_whole: bool = True, compiled: bool = False
    ) -> None:
        self.patches, self.steps, self.compiled = patches, 0, compiled
        self.step = self.patch = 0
        self.index = -1
        self.tokens: Any = None
        self.arriving: Arriving | None = None
        self.gives, self.apart = True, False
        self.skips: bool | None = None
        self._synchronous, self._every_step_whole = max(1, synchronous), every_step_whole
        self._starts = {0}  # steps in which a transformer is called first
        self._part: Callable[[Any], Any] | None = None
        self._wrappers: dict[nn.Module, list[Wrapper]] = {}
        self._at_forwards_end: list[Callable[[], None]] = []
        self._at_schedule: list[Callable[[], None]] = []

    # What methods register.

    def around(self, model: nn.Module, wrapper: Wrapper) -> None:
        """Let ``wrapper`` run around the forward of a transformer, inside of the wrappers that are there already."""
        self._wrappers.setdefault(model, []).append(wrapper)

    def at_forwards_end(self, action: Callable[[], None]) -> None:
        """Call ``action`` when the forwards of a sub-step are over, ahead of the scheduler's step."""
        self._at_forwards_end.append(action)

    def at_schedule(self, action: Callable[[], None]) -> None:
        """Call ``action`` when a schedule is about to be made: what comes next is the first step of another image."""
        self._at_schedule.append(action)

    def computes(self, part: Callable[[Any], Any]) -> None:
        """Say which part of an output this rank computes in a sub-step, as views."""
        self._part = part

    # What methods read.

    def part(self, output: Any) -> Any:
        """Of an output, or of each tensor in it, what this rank computes in this sub-step."""
        return output if self._part is None else self._part(output)

    def when_there(self, action: Callable[[], None], results: list[Tensor]) -> None:
        """Call ``action``, which makes ``results`` of the last forward's output, once that output has arrived."""
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
        """Whether every rank has the whole latents at the end of this step; if not, its patches travel singly."""
        synchronous = self._is_synchronous(step) or self._is_synchronous(step + 1)
        return synchronous or self._every_step_whole or step >= self.steps - 1

    @property
    def whole(self) -> bool:
        """Whether every rank has the whole latents now, between two sub-steps."""
        return self.patch == 0 and (self.step == 0 or self.ends_whole(self.step - 1))

    def after(self, step: int, patch: int) -> tuple[int, int] | None:
        """The sub-step behind this one, if it follows without a pause: patch by patch, each as soon as it is there."""
        if patch < self.patches - 1:
            return None if self._is_synchronous(step) else (step, patch + 1)
        return None if self.ends_whole(step) else (step + 1, 0)

    def extend(self, synchronous: int) -> None:
        """Let at least so many first steps of each transformer be synchronous."""
        self._synchronous = max(self._synchronous, synchronous)

    # What moves it on.

    def announce(self, steps: int, order: int) -> None:
        """Note the number of steps of a schedule, ``order`` of which make one inference step.

        Raises:
            ValueError: there are more synchronous steps than that.
        """
        if self._synchronous >= steps + order:
            raise ValueError(
                f"warmup_steps={self._synchronous // order} is more than the {-(-steps // order)} steps of this call:"
                " use at most as many"
            )
        self.begin(steps)

    def begin(self, steps: int) -> None:
        """Go to the first of so many steps."""
        self.step = self.patch = 0
        self.steps, self._starts = steps, {0}

    def start(self, step: int) -> None:
        """Note that a transformer is called first in this step, from which on steps are synchronous, then."""
        self._starts.add(step)

    @contextmanager
    def running(self, scheduler: Any) -> Iterator[None]:
        """Within the context, the transformers run inside their wrappers, and the scheduler moves this state on.

        Raises:
            RuntimeError: one of the transformers is in a wrapped call already.
        """
        with ExitStack() as stack:
            stack.enter_context(self._stepped_by(scheduler))
            for model, wrappers in self._wrappers.items():
                stack.enter_context(self._wrapped(model, wrappers))
            yield

    def _wrapped(self, model: nn.Module, wrappers: list[Wrapper]) -> AbstractContextManager[None]:
        original = model.forward
        if hasattr(original, "call_state"):
            raise RuntimeError(f"{type(model).__name__} runs in parallel already: active() and calls do not nest")
        bind = Binder(original)

        def innermost(arguments: Arguments) -> Any:
            return self.part(original(**arguments))

        wrapped: Forward = innermost
        for wrapper in reversed(wrappers):
            wrapped = functools.partial(wrapper, wrapped)

        @functools.wraps(original)
        def forward(*args: Any, **kwargs: Any) -> Any:
            self.index += 1
            try:
                return wrapped(bind(args, kwargs))
            finally:
                self.tokens, self.gives, self.apart = None, True, False

        forward.call_state = self
        return replaced(model, "forward", forward)

    @contextmanager
    def _stepped_by(self, scheduler: Any) -> Iterator[None]:
        """Within the context, steps and schedules of a scheduler, or of a copy of it, are noticed."""
        if scheduler is None or not self._wrappers:
            yield
            return
        with (
            replaced(scheduler, "step", self._around(scheduler, "step", self._end_forwards, self._advance)),
            replaced(scheduler, "set_timesteps", self._around(scheduler, "set_timesteps", self._restart)),
        ):
            yield

    def _around(
        self, scheduler: Any, name: str, before: Callable[[], None], after: Callable[[], None] | None = None
    ) -> MethodType:
        """A scheduler's method with actions around it; copies of the scheduler get one that is bound to them."""
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
        """To the next sub-step. Without patches, a step without a forward is of further latents, as of sound."""
        if self.index < 0 and self.patches == 1:
            return
        self.index, self.patch = -1, self.patch + 1
        if self.patch == self.patches:
            self.step, self.patch = self.step + 1, 0
