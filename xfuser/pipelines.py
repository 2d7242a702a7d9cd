"""Classes that load a Diffusers pipeline and wrap it in one call: ``xFuserFluxPipeline`` for ``FluxPipeline``, ..."""

from dataclasses import replace
from functools import cache
from typing import Any

import diffusers
import torch

from xfuser.config import EngineConfig, InputConfig
from xfuser.parallel import xDiTParallel
from xfuser.pipeline_io.arguments import pipeline_arguments
from xfuser.weights.loading import DTYPE_ARGUMENT, load_pipeline

PREFIX = "xFuser"


class LoadedPipeline(xDiTParallel):
    """A wrapped pipeline of one Diffusers class, which subclasses name."""

    pipeline_class: Any

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: str,
        engine_config: EngineConfig,
        torch_dtype: torch.dtype | None = None,
        **components: Any,
    ) -> "LoadedPipeline":
        """Load a pipeline to this rank's device, and wrap it.

        Args:
            pretrained_model_name_or_path: a folder, or a name on the hub.
            engine_config: from ``xFuserArgs.create_config()``.
            torch_dtype: of the weights; that of the configuration by default.
            components: parts to use in place of those in the folder, and other arguments of Diffusers.

        Raises:
            ValueError: as :func:`xfuser.load_pipeline` and :class:`xfuser.xDiTParallel`.
        """
        model = replace(engine_config.model_config, model=str(pretrained_model_name_or_path))
        if torch_dtype is not None:
            components[DTYPE_ARGUMENT] = torch_dtype
        pipe = load_pipeline(replace(engine_config, model_config=model), None, cls.pipeline_class, **components)
        return cls(pipe, engine_config)

    def prepare_run(self, input_config: InputConfig, steps: int = 3) -> None:
        """Draw once with few steps and throw the image away, so that later calls find everything made.

        There are more steps than asked for where the warm-up of PipeFusion or DistriFusion is longer, and never one
        alone, which some pipelines take for a request of another way to draw.
        """
        runtime, parallel = self.engine_config.runtime_config, self.engine_config.parallel_config
        steps = max(steps, 2, runtime.warmup_steps + 1 if parallel.pipelined or parallel.patched else 0)
        self(**pipeline_arguments(self._pipe, input_config) | {"num_inference_steps": steps, "output_type": "latent"})
        self.__dict__["_output"] = None


@cache
def pipeline_class(name: str) -> type[LoadedPipeline]:
    """``xFuser<Name>Pipeline`` for any ``<Name>Pipeline`` of Diffusers.

    Raises:
        AttributeError: Diffusers has none of that name.
    """
    wrapped = getattr(diffusers, name.removeprefix(PREFIX))
    return type(name, (LoadedPipeline,), {"pipeline_class": wrapped, "__doc__": f"A wrapped ``{wrapped.__name__}``."})
