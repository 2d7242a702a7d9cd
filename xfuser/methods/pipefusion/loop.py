"""What a pipeline's loop shows of its steps, where each is led through several sub-steps: N steps, as ever."""

from collections.abc import Callable, Iterator
from typing import Any

from xfuser.call import CallState
from xfuser.core.hooks import Arguments


def has_callback(arguments: Arguments) -> bool:
    """Whether a pipeline's call asks for the latents on the way."""
    return arguments.get("callback_on_step_end") is not None or arguments.get("callback") is not None


def stepwise_callbacks(arguments: Arguments, call: CallState) -> Arguments:
    """A pipeline's arguments with callbacks that are called once a step, with the number of the step.

    When they are called, their sub-step has just ended.
    """
    arguments = dict(arguments)
    on_step_end, older = arguments.get("callback_on_step_end"), arguments.get("callback")
    if on_step_end is not None:
        if hasattr(on_step_end, "tensor_inputs"):  # Diffusers' own callback objects say what they need
            arguments["callback_on_step_end_tensor_inputs"] = on_step_end.tensor_inputs

        def after_substep(pipe: Any, index: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            if call.patch:
                return {}
            if getattr(pipe, "_num_timesteps", 0) > call.steps:
                pipe._num_timesteps = call.steps
            return on_step_end(pipe, call.step - 1, timestep, values)

        arguments["callback_on_step_end"] = after_substep
    every = arguments.get("callback_steps", 1)
    if older is not None and isinstance(every, int) and every > 0:  # else the pipeline refuses it

        def at_step(index: int, timestep: Any, latents: Any) -> None:
            if (call.step - 1) % every == 0:
                older(index, timestep, latents)

        arguments |= {"callback": at_step, "callback_steps": 1}
    return arguments


def stepwise_progress(progress_bar: Callable[..., Any], call: CallState) -> Callable[..., Any]:
    """A pipeline's ``progress_bar`` that counts steps."""

    def bar(iterable: Any = None, total: int | None = None) -> Any:
        if iterable is None:
            return progress_bar(total=_steps(total, call))
        return _ticking(iterable, progress_bar(total=len(iterable) // call.patches))

    def _ticking(items: Any, shown: Any) -> Iterator[Any]:
        with shown:
            for item in items:
                yield item
                if call.patch == 0:
                    shown.update()

    return bar


def plain_steps(get_timesteps: Callable[..., Any], call: CallState) -> Callable[..., Any]:
    """A pipeline's ``get_timesteps`` that is given inference steps, where the pipeline counted timesteps."""

    def steps(num_inference_steps: int, *args: Any, **kwargs: Any) -> Any:
        return get_timesteps(_steps(num_inference_steps, call), *args, **kwargs)

    return steps


def _steps(count: int, call: CallState) -> int:
    """Pipelines that pass sigmas take the number of timesteps for the number of steps."""
    return count // call.patches if count > call.steps else count
