"""State that scripts with a parallel forward of their own share between functions, mainly the input's size."""

from dataclasses import dataclass, replace
from typing import Any

from xfuser.core.checks import check_count
from xfuser.core.distributed.parallel_state import (
    destroy_distributed_environment,
    init_distributed_environment,
    initialize_model_parallel,
    model_parallel_is_initialized,
)


@dataclass(frozen=True)
class InputParameters:
    """The input of the next forwards as the script described it; sizes in pixels, None if not given."""

    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    batch_size: int | None = None
    num_inference_steps: int | None = None
    max_condition_sequence_length: int | None = None


class RuntimeState:
    """Values that a script stores for its own forwards. The engine does not read them.

    Attributes:
        parallel_config, runtime_config: those of the engine configuration.
        input_config: the values passed to :meth:`set_input_parameters` or :meth:`set_video_input_parameters`.
        split_text_embed_in_sp: whether the script splits text tokens over the sequence group, or keeps them whole on
            every rank, as joint tensors of the attention layer.
    """

    def __init__(self, engine_config: Any) -> None:
        self.parallel_config = engine_config.parallel_config
        self.runtime_config = engine_config.runtime_config
        self.input_config = InputParameters()
        self.split_text_embed_in_sp = True

    def set_input_parameters(
        self,
        height: int | None = None,
        width: int | None = None,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        max_condition_sequence_length: int | None = None,
        split_text_embed_in_sp: bool = True,
    ) -> None:
        """Store the size of the next images; a value of None leaves the previous one unchanged."""
        given = InputParameters(height, width, None, batch_size, num_inference_steps, max_condition_sequence_length)
        self._store(given, split_text_embed_in_sp)

    def set_video_input_parameters(
        self,
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
        batch_size: int | None = None,
        num_inference_steps: int | None = None,
        split_text_embed_in_sp: bool = True,
    ) -> None:
        """Store the size of the next videos; a value of None leaves the previous one unchanged."""
        given = InputParameters(height, width, num_frames, batch_size, num_inference_steps)
        self._store(given, split_text_embed_in_sp)

    def destroy_distributed_env(self) -> None:
        """Release all groups, as ``destroy_distributed_environment()`` does, and drop this state."""
        global _state
        destroy_distributed_environment()
        _state = None

    destory_distributed_env = destroy_distributed_env  # the spelling that older scripts use

    def _store(self, parameters: InputParameters, split_text: bool) -> None:
        given = {name: value for name, value in vars(parameters).items() if value is not None}
        for name, value in given.items():
            check_count(name, value)
        self.input_config = replace(self.input_config, **given)
        self.split_text_embed_in_sp = split_text


_state: RuntimeState | None = None


def initialize_runtime_state(pipeline: Any, engine_config: Any) -> None:
    """Make the state that :func:`get_runtime_state` returns, and the groups of ``engine_config`` if none exist.

    Args:
        pipeline: not used; scripts pass their pipeline.
        engine_config: from ``xFuserArgs.create_config()``; a ValueError is raised for what has no degrees.
    """
    global _state
    if not hasattr(engine_config, "parallel_config"):
        raise ValueError(f"engine_config={engine_config!r} must be the first result of xFuserArgs(...).create_config()")
    if not model_parallel_is_initialized():
        init_distributed_environment()
        initialize_model_parallel(**engine_config.parallel_config.group_degrees)
    _state = RuntimeState(engine_config)


def get_runtime_state() -> RuntimeState:
    """The state of this process.

    Raises:
        RuntimeError: it does not exist yet.
    """
    if _state is None:
        raise RuntimeError("there is no runtime state: call initialize_runtime_state(pipe, engine_config) first")
    return _state


def runtime_state_is_initialized() -> bool:
    """Whether :func:`initialize_runtime_state` was called."""
    return _state is not None
