"""Adapters of a pipeline's loop, which runs sub-steps: callbacks, guiders and progress bars see N steps, as without
PipeFusion, and noise and text are computed once per step."""

import inspect
import sys
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from functools import partial, wraps
from typing import Any

from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from xfuser.call import CallState
from xfuser.core.hooks import Arguments, replaced
from xfuser.methods.pipefusion.refusals import refuse
from xfuser.models.registry import planned_models


def needs_whole_steps(pipe: Any, arguments: Arguments) -> bool:
    """Whether all ranks need the full latents after each step.

    A callback needs them. So do synchronous steps that may begin at any step: where guidance begins or ends during the
    loop, or where the pipeline switches to another transformer at a step that is not known in advance.
    """
    callback = arguments.get("callback_on_step_end") is not None or arguments.get("callback") is not None
    within = any(guider._start > 0 or guider._stop < 1 for guider in guiders_of(pipe))
    return callback or within or (len(planned_models(pipe)) > 1 and boundary_of(pipe) is None)


def adapt_loop(pipe: Any, call: CallState, note: Callable[[Any], None]) -> None:
    """During the call, the pipeline's loop over sub-steps counts steps; ``note`` gets the latents that it prepares."""
    if hasattr(pipe, "prepare_latents"):
        call.enter_context(replaced(pipe, "prepare_latents", preparing(pipe.prepare_latents, note)))
    for guider in guiders_of(pipe):
        call.enter_context(replaced(guider, "set_state", stepwise_guider(guider.set_state, call)))
    noise = LoopNoise(call)
    for module in {sys.modules.get(cls.__module__) for cls in type(pipe).__mro__}:
        if hasattr(module, "randn_tensor"):
            call.enter_context(replaced(module, "randn_tensor", noise.once_a_step(module.randn_tensor)))
    progress = partial(stepwise_progress, begin=noise.begin)
    for name, stepwise in (("progress_bar", progress), ("get_timesteps", plain_steps)):
        for owner in (pipe, *loops_of(pipe)):
            if hasattr(owner, name):
                call.enter_context(replaced(owner, name, stepwise(getattr(owner, name), call)))


def guiders_of(pipe: Any) -> list[Any]:
    """A pipeline's enabled guiders: components that create the branches of guidance and mix their outputs."""
    return [
        part for part in pipe.components.values() if getattr(part, "_enabled", False) and hasattr(part, "set_state")
    ]


def branches_of(pipe: Any) -> list[Any]:
    """Values that change when the branches of guidance change, as far as the pipeline and its guiders provide them."""
    return [getattr(pipe, "do_classifier_free_guidance", None), *(one.num_conditions for one in guiders_of(pipe))]


def stepwise_guider(set_state: Callable[..., Any], call: CallState) -> Callable[..., Any]:
    """Wrap a guider's ``set_state`` to get the number of the step, where the pipeline passes that of the sub-step."""

    def of_step(step: int, num_inference_steps: int, timestep: Any) -> Any:
        return set_state(step // call.patches, _steps(num_inference_steps, call), timestep)

    return of_step


def boundary_of(pipe: Any) -> float | None:
    """The timestep below which a pipeline calls its second transformer (Wan 2.2); None if its config has no ratio."""
    ratio = getattr(getattr(pipe, "config", None), "boundary_ratio", None)
    return None if ratio is None else ratio * pipe.scheduler.config.num_train_timesteps


def stepwise_callbacks(arguments: Arguments, call: CallState) -> Arguments:
    """Return a pipeline's arguments with callbacks that run once per step and get the number of the step.

    The pipeline calls them directly after each sub-step.
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
        if hasattr(on_step_end, "tensor_inputs"):  # Diffusers' own callback objects list what they need
            arguments["callback_on_step_end_tensor_inputs"] = on_step_end.tensor_inputs
        arguments["callback_on_step_end"] = after_substep
    if older is not None and isinstance(every, int) and every > 0:  # otherwise the pipeline raises
        arguments |= {"callback": after_step, "callback_steps": 1}
    return arguments


def stepwise_control(pipe: Any, arguments: Arguments, patches: int) -> Arguments:
    """Return a pipeline's arguments with the start and end of ControlNets converted from steps to sub-steps.

    Pipelines apply a ControlNet in step i of N if i/N >= start and (i+1)/N <= end. Here i counts sub-steps: bounds that
    are half a sub-step away from the boundary of a step select all sub-steps of a step, or none.

    Raises:
        ValueError: the call does not give the number of steps.
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
    """Noise that a pipeline's loop draws outside of its scheduler: drawn with patch 0 of a step, for all patches."""

    def __init__(self, call: CallState) -> None:
        self._call, self._substep = call, (-1, 0)
        self.begin()

    def begin(self) -> None:
        """Drop the noise of the last loop; must be called before each loop."""
        self._drawn: list[Tensor] = []

    def once_a_step(self, draw: Callable[..., Tensor]) -> Callable[..., Tensor]:
        """Wrap ``randn_tensor`` to draw once per step."""

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
                refuse("loops that draw noise irregularly", "a sub-step draws more of it than the first of its step")
            return noise.clone()

        return drawn


def stepwise_progress(
    progress_bar: Callable[..., Any], call: CallState, begin: Callable[[], None]
) -> Callable[..., Any]:
    """Wrap a pipeline's ``progress_bar`` to count steps; ``begin`` is called before the loop that it shows."""

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
    """Wrap a pipeline's ``get_timesteps`` to get the number of inference steps, where the pipeline counts timesteps."""

    def steps(num_inference_steps: int, *args: Any, **kwargs: Any) -> Any:
        return get_timesteps(_steps(num_inference_steps, call), *args, **kwargs)

    return steps


def preparing(prepare_latents: Callable[..., Any], note: Callable[[Any], None]) -> Callable[..., Any]:
    """Wrap a pipeline's ``prepare_latents`` to call ``note`` with its first result, the latents."""

    @wraps(prepare_latents)
    def prepare(*args: Any, **kwargs: Any) -> Any:
        results = prepare_latents(*args, **kwargs)
        note(results[0] if isinstance(results, tuple) else results)
        return results

    return prepare


def _steps(count: int, call: CallState) -> int:
    """Convert a count of timesteps, which pipelines that pass sigmas use as the number of steps, to steps."""
    return count // call.patches if count > call.steps else count


def once_a_step(module: nn.Module, call: CallState) -> AbstractContextManager[None]:
    """Within the context, a module that works only on text runs with patch 0; other patches reuse its output."""
    outputs: dict[int, Tensor] = {}
    original = module.forward

    @wraps(original)
    def forward(*args: Any, **kwargs: Any) -> Tensor:
        if call.patch == 0:
            outputs[call.index] = original(*args, **kwargs)
        return outputs[call.index]

    return replaced(module, "forward", forward)


def loops_of(pipe: Any) -> list[Any]:
    """The blocks of a modular pipeline that loop and have a progress bar; empty for other pipelines."""
    blocks = [getattr(pipe, "_blocks", None)]  # the public attribute returns copies
    for block in blocks:
        blocks += getattr(block, "sub_blocks", {}).values()
    return [block for block in blocks if hasattr(block, "progress_bar")]
