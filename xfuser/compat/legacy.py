"""The interface of the engine's first generation: one configuration selects one method.

    config = DistriConfig(height=1024, width=1024, parallelism="pipefusion", pp_num_patch=4, warmup_steps=4)
    pipe = DistriPixArtAlphaPipeline.from_pretrained(distri_config=config, pretrained_model_name_or_path=FOLDER_OR_NAME)
    image = pipe("a small cactus").images[0]

It is a thin layer over :class:`xfuser.xFuserArgs` and :class:`xfuser.xDiTParallel`, which combine methods.
"""

import inspect
import logging
from dataclasses import dataclass
from functools import cache
from typing import Any

import diffusers
import torch
import torch.nn.functional as F
from torch import nn

from xfuser.config import xFuserArgs
from xfuser.config.config import ASYNCHRONOUS, check_known
from xfuser.core.distributed import get_world_group, launched_world_size
from xfuser.pipelines import LoadedPipeline, pipeline_class

logger = logging.getLogger(__name__)

PIPELINES = {
    "DistriDiTPipeline": "DiTPipeline",
    "DistriHunyuanDiTPipeline": "HunyuanDiTPipeline",
    "DistriPixArtAlphaPipeline": "PixArtAlphaPipeline",
    "DistriPixArtSigmaPipeline": "PixArtSigmaPipeline",
    "DistriSD3Pipeline": "StableDiffusion3Pipeline",
    "DistriSDXLPipeline": "StableDiffusionXLPipeline",
}
PARALLELISM = ("pipefusion", "patch", "naive_patch", "tensor", "sequence")
SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "dpm-solver": "DPMSolverMultistepScheduler",
    "dpmsolver_multistep": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
}


@dataclass(eq=False)
class DistriConfig:
    """The configuration of a run. Every rank creates one, which also makes the process groups.

    If classifier-free guidance is split, half of the ranks compute each branch and divide its work among them.

    Args:
        height, width: default size of the image, in pixels.
        do_classifier_free_guidance: whether calls use guidance; if not, ``guidance_scale`` defaults to 1.
        split_batch: whether the guidance branches run on different ranks. With an odd number of ranks, each runs both.
        warmup_steps: number of synchronous first steps of ``"patch"`` and ``"pipefusion"``.
        mode: the mode of ``"patch"``, one of ``xfuser.config.config.MODES``.
        parallelism: ``"patch"`` (DistriFusion), ``"naive_patch"``, ``"pipefusion"``, ``"tensor"`` or ``"sequence"``.
        split_scheme: how ``"naive_patch"`` cuts the image: ``"row"``, ``"col"`` or ``"alternate"``.
        pp_num_patch: number of patches of ``"pipefusion"``.
        attn_num: number of blocks of each stage of ``"pipefusion"``.
        ulysses_degree: the Ulysses degree of ``"sequence"``; the ring degree follows from it. All ranks by default.
        use_resolution_binning: whether sizes are mapped to those that the model was trained with.
        scheduler: ``"ddim"``, ``"dpm-solver"`` or ``"euler"``; the pipeline's own by default.
        verbose: whether the first rank logs the degrees.
        comm_checkpoint, use_cuda_graph: no effect; accepted for scripts that pass them.

    Raises:
        ValueError: a value is unknown, or does not fit the number of ranks.
    """

    height: int = 1024
    width: int = 1024
    do_classifier_free_guidance: bool = True
    split_batch: bool = True
    warmup_steps: int = 4
    comm_checkpoint: int = 60
    mode: str = ASYNCHRONOUS
    use_cuda_graph: bool = False
    parallelism: str = "patch"
    split_scheme: str = "row"
    pp_num_patch: int = 2
    verbose: bool = False
    use_resolution_binning: bool = True
    attn_num: list[int] | None = None
    scheduler: str | None = None
    ulysses_degree: int | None = None

    def __post_init__(self) -> None:
        check_known("parallelism", self.parallelism, PARALLELISM)
        if self.scheduler is not None:
            check_known("scheduler", self.scheduler, SCHEDULERS)
        self.world_size = launched_world_size()
        self.split_batch = self.do_classifier_free_guidance and self.split_batch and self.world_size % 2 == 0
        self.n_device_per_batch = ranks = self.world_size // (1 + self.split_batch)
        ulysses = self.ulysses_degree or ranks
        pipefusion = {"num_pipeline_patch": self.pp_num_patch, "attn_layer_num_for_pp": self.attn_num}
        degrees = {
            "patch": {"distrifusion_degree": ranks, "distrifusion_mode": self.mode},
            "naive_patch": {"naive_patch_degree": ranks, "split_scheme": self.split_scheme if ranks > 1 else None},
            "pipefusion": {"pipefusion_parallel_degree": ranks, **pipefusion},
            "tensor": {"tensor_parallel_degree": ranks},
            "sequence": {"ulysses_degree": ulysses, "ring_degree": ranks // ulysses},
        }[self.parallelism]
        args = xFuserArgs(use_cfg_parallel=self.split_batch, warmup_steps=self.warmup_steps, **degrees)
        args.height, args.width = self.height, self.width
        args.num_inference_steps = max(args.num_inference_steps, self.warmup_steps)  # calls pass the actual number
        self.engine_config, _ = args.create_config()
        self.rank, self.device = get_world_group().rank, get_world_group().device
        if self.verbose and self.rank == 0:
            logger.warning("%s", self.engine_config.parallel_config)


class SingleMethodPipeline(LoadedPipeline):
    """A pipeline that is configured by a :class:`DistriConfig`."""

    @classmethod
    def from_pretrained(
        cls, distri_config: DistriConfig, pretrained_model_name_or_path: str, **components: Any
    ) -> "SingleMethodPipeline":
        """Load a pipeline to this rank's device and wrap it, as :class:`xfuser.pipelines.LoadedPipeline` does."""
        pipe = super().from_pretrained(pretrained_model_name_or_path, distri_config.engine_config, **components)
        if distri_config.scheduler:
            kind = getattr(diffusers, SCHEDULERS[distri_config.scheduler])
            pipe.scheduler = kind.from_config(pipe.scheduler.config)
        pipe.__dict__["distri_config"] = distri_config
        return pipe

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the pipeline on all ranks; the configuration provides defaults for arguments that are not passed."""
        config = self.distri_config
        said = {name: getattr(config, name) for name in ("height", "width", "use_resolution_binning")}
        said |= {} if config.do_classifier_free_guidance else {"guidance_scale": 1.0}
        taken = inspect.signature(self._pipe.__call__).parameters
        return super().__call__(*args, **{name: said[name] for name in said if name in taken} | kwargs)


@cache
def _pipeline(name: str) -> type[SingleMethodPipeline]:
    wrapped = pipeline_class(f"xFuser{PIPELINES[name]}").pipeline_class
    return type(name, (SingleMethodPipeline,), {"pipeline_class": wrapped})


def __getattr__(name: str) -> Any:
    if name in PIPELINES:
        return _pipeline(name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


class PatchConv2d(nn.Conv2d):
    """A convolution that computes ``block_size`` rows of its output at a time, which bounds its workspace.

    Args:
        block_size: number of rows; 0 for all at once. The other arguments are those of ``torch.nn.Conv2d``.
    """

    def __init__(self, *args: Any, block_size: int = 0, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        if not isinstance(block_size, int) or block_size < 0:
            raise ValueError(f"block_size={block_size!r} must be a number of rows, or 0 for all at once")
        self.block_size = block_size

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """``[B, C, H, W]`` to ``[B, C', H', W']``."""
        left, right, top, bottom = self._reversed_padding_repeated_twice
        if self.padding_mode != "zeros":
            x = F.pad(x, (left, right, top, bottom), self.padding_mode)
            left = right = top = bottom = 0
        (stride, _), reach = self.stride, self.dilation[0] * (self.kernel_size[0] - 1) + 1
        rows = (x.shape[-2] + top + bottom - reach) // stride + 1
        parts = []
        for start in range(0, rows, self.block_size or rows):
            first = start * stride - top
            last = (min(start + (self.block_size or rows), rows) - 1) * stride - top + reach
            band = x[..., max(first, 0) : max(last, 0), :]
            above, below = min(last, 0) - first, last - max(first, x.shape[-2])
            band = F.pad(band, (left, right, max(above, 0), max(below, 0)))
            parts.append(F.conv2d(band, self.weight, self.bias, self.stride, 0, self.dilation, self.groups))
        return torch.cat(parts, dim=-2)
