"""Classes that load and wrap a Diffusers pipeline in one call: ``xFuserFluxPipeline`` for ``FluxPipeline``, ..."""

from dataclasses import replace
from functools import cache
from typing import Any

import diffusers
import torch

from xfuser.config import EngineConfig, InputConfig, checked_config
from xfuser.core.distributed import initialize_runtime_state, is_dp_last_group
from xfuser.parallel import xDiTParallel
from xfuser.pipeline_io.arguments import pipeline_arguments
from xfuser.weights.loading import DTYPE_ARGUMENT, load_pipeline

PREFIX = "xFuser"


class LoadedPipeline(xDiTParallel):
    """A wrapped pipeline of one Diffusers class; subclasses set ``pipeline_class``."""

    pipeline_class: Any
    is_dp_last_group = staticmethod(is_dp_last_group)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        engine_config: EngineConfig,
        torch_dtype: torch.dtype | None = None,
        **components: Any,
    ) -> "LoadedPipeline":
        """Load a pipeline onto this rank's device, wrap it, and make the state of ``get_runtime_state()``.

        Args:
            pretrained_model_name_or_path: a folder, or a hub name.
            engine_config: from ``xFuserArgs.create_config()``.
            torch_dtype: dtype of the weights; the dtype of the configuration by default.
            components: components that replace those in the folder, and other arguments of Diffusers.

        Raises:
            ValueError: see :func:`xfuser.load_pipeline` and :class:`xfuser.xDiTParallel`.
        """
        model = replace(checked_config(engine_config).model_config, model=str(pretrained_model_name_or_path))
        if torch_dtype is not None:
            components[DTYPE_ARGUMENT] = torch_dtype
        pipe = load_pipeline(replace(engine_config, model_config=model), None, cls.pipeline_class, **components)
        initialize_runtime_state(pipe, engine_config)
        return cls(pipe, engine_config)

    def prepare_run(self, input_config: InputConfig, steps: int = 3) -> None:
        """Run one call with few steps and discard its output, so that later calls need no setup.

        The call has more steps than given if the warm-up of PipeFusion or DistriFusion is longer, and always at least
        two, as some pipelines treat a single step as another mode.
        """
        runtime, parallel = self.engine_config.runtime_config, self.engine_config.parallel_config
        steps = max(steps, 2, runtime.warmup_steps + 1 if parallel.pipelined or parallel.patched else 0)
        self(**pipeline_arguments(self._pipe, input_config) | {"num_inference_steps": steps, "output_type": "latent"})
        self._output = None


@cache
def pipeline_class(name: str) -> type[LoadedPipeline]:
    """``xFuser<Name>Pipeline`` for any ``<Name>Pipeline`` of Diffusers.

    Raises:
        AttributeError: Diffusers has no pipeline of that name.
    """
    wrapped = getattr(diffusers, name.removeprefix(PREFIX))
    return type(name, (LoadedPipeline,), {"pipeline_class": wrapped, "__doc__": f"A wrapped ``{wrapped.__name__}``."})
