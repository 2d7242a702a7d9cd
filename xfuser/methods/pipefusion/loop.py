"""What a pipeline's loop shows of its steps, each of which has several sub-steps: N steps, as without PipeFusion; and
what is computed once a step."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import wraps
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from xfuser.call import CallState
from xfuser.core.hooks import Arguments, replaced
from xfuser.methods.pipefusion.refusals import refuse
from xfuser.models.registry import planned_models


def needs_whole_steps(pipe: Any, arguments: Arguments) -> bool:
    """Whether all ranks need the latents of each step: for a callback, or as any step may begin with synchronous ones,
    where it calls another transformer or guidance begins or ends."""
    callback = arguments.get("callback_on_step_end") is not None or arguments.get("callback") is not None
    within = any(guider._start > 0 or guider._stop < 1 for guider in guiders_of(pipe))
    return callback or within or (len(planned_models(pipe)) > 1 and boundary_of(pipe) is None)


def guiders_of(pipe: Any) -> list[Any]:
    """A pipeline's guiders that take part: components that make the branches of guidance, and mix their outputs."""
    return [
        part for part in pipe.components.values() if getattr(part, "_enabled", False) and hasattr(part, "set_state")
    ]


def branches_of(pipe: Any) -> list[Any]:
    """What tells the branches of guidance in a step from those in others, where a pipeline or its guiders tell."""
    return [getattr(pipe, "do_classifier_free_guidance", None), *(one.num_conditions for one in guiders_of(pipe))]


def stepwise_guider(set_state: Callable[..., Any], call: CallState) -> Callable[..., Any]:
    """A guider's ``set_state`` that is told the number of the step, where the pipeline counts sub-steps."""

    def of_step(step: int, num_inference_steps: int, timestep: Any) -> Any:
        return set_state(step // call.patches, _steps(num_inference_steps, call), timestep)

    return of_step


def boundary_of(pipe: Any) -> float | None:
    """The timestep below which a pipeline calls its second transformer (Wan 2.2); None where it does not say so."""
    ratio = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
    return None if ratio is None else ratio * pipe.scheduler.config.num_train_timesteps


def stepwise_callbacks(arguments: Arguments, call: CallState) -> Arguments:
    """A pipeline's arguments with callbacks that are called once a step, with the number of the step.

    The pipeline calls them when a sub-step has just ended.
    """
    arguments = dict(arguments)
    on_step_end, older = arguments.get("callback_on_step_end"), arguments.get("callback")
    every = arguments.get("callback_steps", 1)

    def after_substep(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
        return {} if call.patch else on_step_end(pipe, call.step - 1, timestep, values)

    def after_step(index: int, timestep: Any, latents: Any) -> None:
        if (call.step - 1) % every == 0:
            older(index, timestep, latents)

    if on_step_end is not None:
        if hasattr(on_step_end, "tensor_inputs"):  # Diffusers' own callback objects say what they need
            arguments["callback_on_step_end_tensor_inputs"] = on_step_end.tensor_inputs
        arguments["callback_on_step_end"] = after_substep
    if older is not None and isinstance(every, int) and every > 0:  # else the pipeline refuses it
        arguments |= {"callback": after_step, "callback_steps": 1}
    return arguments


def stepwise_control(pipe: Any, arguments: Arguments, patches: int) -> Arguments:
    """A pipeline's arguments with the part of the steps in which ControlNets take part, as a part of the sub-steps.

    Pipelines keep step i of N if i/N is not less than the start, and (i+1)/N not more than the end. Here i counts
    sub-steps: bounds half a sub-step away from where two steps meet keep all sub-steps of a step, or none.

    Raises:
        ValueError: the call does not say how many steps there are.
    """
    bounds = {name: arguments[name] for name in ("control_guidance_start", "control_guidance_end") if name in arguments}
    if not set(tree_leaves(bounds)) - {0.0, 1.0}:
        return arguments
    known = inspect.signature(pipe.__call__).parameters
    if pipe.scheduler.order > 1 or "strength" in known:
        why = "the pipeline compares them with the number of the sub-step, and the call does not say how many there are"
        refuse(f"{bounds} of {type(pipe).__name__}", why, "Use 0 and 1")
    given = arguments.get("sigmas")
    counted = arguments.get("num_inference_steps", known["num_inference_steps"].default)
    steps = counted if given is None else len(given)

    def start(bound: float) -> float:
        first = next(step for step in range(steps + 1) if step / steps >= bound)
        return max(0.0, (first - 0.5 / patches) / steps)

    def end(bound: float) -> float:
        last = max(step for step in range(steps + 1) if step / steps <= bound)
        return min(1.0, (last + 0.5 / patches) / steps)

    return arguments | {name: tree_map(end if name.endswith("end") else start, x) for name, x in bounds.items()}


class LoopNoise:
    """Noise that a pipeline's loop draws beside its scheduler: with the first patch of a step, for all of them."""

    def __init__(self, call: CallState) -> None:
        self._call, self._substep = call, (-1, 0)
        self.begin()

    def begin(self) -> None:
        """To be called ahead of the loop."""
        self._drawn: list[Tensor] = []

    @contextmanager
    def once_a_step(self, pipe: Any) -> Iterator[None]:
        """Within the context, ``randn_tensor`` of the pipeline's modules draws once a step."""
        modules = {sys.modules.get(cls.__module__) for cls in type(pipe).__mro__}
        with ExitStack() as stack:
            for module in (one for one in modules if hasattr(one, "randn_tensor")):
                stack.enter_context(replaced(module, "randn_tensor", self._kept(module.randn_tensor)))
            yield

    def _kept(self, draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        @wraps(draw)
        def drawn(*args: Any, **kwargs: Any) -> Tensor:
            substep = self._call.step, self._call.patch
            if substep != self._substep:
                if substep[0] != self._substep[0] or not self._call.patch:
                    self._drawn = []
                self._substep, self._next = substep, iter(self._drawn)
            if not self._call.patch:
                self._drawn.append(draw(*args, **kwargs))
                return self._drawn[-1].clone()
            noise = next(self._next, None)
            if noise is None:
                refuse("loops that draw noise now and then", "it would be drawn in some of a step's sub-steps alone")
            return noise.clone()

        return drawn


def stepwise_progress(
    progress_bar: Callable[..., Any], call: CallState, begin: Callable[[], None]
) -> Callable[..., Any]:
    """A pipeline's ``progress_bar`` that counts steps; ``begin`` is called ahead of the loop that it shows."""

    def bar(iterable: Any = None, total: int | None = None) -> Any:
        begin()
        if iterable is None:
            return progress_bar(total=_steps(total, call))
        return ticking(iterable, progress_bar(total=len(iterable) // call.patches))

    def ticking(items: Any, shown: Any) -> Iterator[Any]:
        with shown:
            for item in items:
                yield item
                if call.patch == 0:
                    shown.update()

    return bar


def plain_steps(get_timesteps: Callable[..., Any], call: CallState) -> Callable[..., Any]:
    """A pipeline's ``get_timesteps`` that takes inference steps, where the pipeline counted timesteps."""

    def steps(num_inference_steps: int, *args: Any, **kwargs: Any) -> Any:
        return get_timesteps(_steps(num_inference_steps, call), *args, **kwargs)

    return steps


def preparing(prepare_latents: Callable[..., Any], note: Callable[[Any], None]) -> Callable[..., Any]:
    """A pipeline's ``prepare_latents``, of whose results ``note`` is told the first, the latents."""

    @wraps(prepare_latents)
    def prepare(*args: Any, **kwargs: Any) -> Any:
        results = prepare_latents(*args, **kwargs)
        note(results[0] if isinstance(results, tuple) else results)
        return results

    return prepare


def _steps(count: int, call: CallState) -> int:
    """Pipelines that pass sigmas take the number of timesteps for the number of steps."""
    return count // call.patches if count > call.steps else count


def once_a_step(module: nn.Module, call: CallState) -> AbstractContextManager[None]:
    """Within the context, a module that works on text alone computes with patch 0, and other patches reuse it."""
    outputs: dict[int, Tensor] = {}
    original = module.forward

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        if call.patch == 0:
            outputs[call.index] = original(*args, **kwargs)
        return outputs[call.index]

    return replaced(module, "forward", forward)


def loops_of(pipe: Any) -> list[Any]:
    """The blocks of a modular pipeline that loop, and have a progress bar; of other pipelines none."""
    blocks = [getattr(pipe, "_blocks", None)]  # its public name gives copies
    for block in blocks:
        blocks += getattr(block, "sub_blocks", {}).values()
    return [block for block in blocks if hasattr(block, "progress_bar")]
