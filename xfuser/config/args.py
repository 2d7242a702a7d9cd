"""The flags: each field of one dataclass is a flag, with its help, group and type."""

import argparse
import importlib
import math
import os
import typing
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import torch

from xfuser.config.config import (
    ASYNCHRONOUS,
    DEGREES,
    MODES,
    EngineConfig,
    InputConfig,
    ModelConfig,
    ParallelConfig,
    RuntimeConfig,
    check_known,
    in_bytes,
)
from xfuser.config.kinds import check_types
from xfuser.config.parser import SwitchAction
from xfuser.core import compiler, device as devices
from xfuser.core.attention.kernels import available_backends, check_backend
from xfuser.core.distributed import init_distributed_environment, launched_world_size
from xfuser.core.distributed.failure import fail_together
from xfuser.models.registry import check_folder
from xfuser.vae.engines import check_engine

DTYPES = {"auto": None, "float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DTYPES |= {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
TEXT_ENCODER_MODES = ("replicate", "shard", "rank0", "offload")
PLANNER = "xfuser.planner.auto"
SHIPPED = os.path.join(os.path.dirname(os.path.dirname(__file__)), "assets")
SHIPPED_PIPELINE = os.path.join(SHIPPED, "shapes-256")
SHIPPED_SIDE = 256  # image size in pixels that the shipped pipelines were trained with


def shipped_folder(model: str | None) -> str | None:
    """Folder of a pipeline shipped with the package, given as its folder, its name, or None for the default pipeline.

    Returns None for any other model.
    """
    if not model:
        return SHIPPED_PIPELINE
    folder = model if os.path.exists(model) else os.path.join(SHIPPED, model)
    return folder if os.path.dirname(os.path.abspath(folder)) == SHIPPED and os.path.isdir(folder) else None


def _flag(group: str, default: Any, help: str, nargs: str | None = None) -> Any:
    return field(default=default, metadata={"group": group, "help": help, "nargs": nargs})


_model, _runtime, _parallel, _input = (
    partial(_flag, f"{group} Options") for group in ("Model", "Runtime", "Parallel Processing", "Input")
)


@dataclass
class xFuserArgs:
    """The options of a run; :meth:`create_config` checks them and converts them into configuration objects."""

    model: str | None = _model(
        None,
        f"Folder or hub name of a Diffusers pipeline, or a shipped pipeline: {', '.join(sorted(os.listdir(SHIPPED)))};"
        " default: shapes-256.",
    )
    download_dir: str | None = _model(None, "Folder for downloads from the hub.")
    trust_remote_code: bool = _model(False, "Allow running a pipeline's own code from the hub.")

    warmup_steps: int = _runtime(1, "Synchronous warm-up steps of PipeFusion and DistriFusion; ignored otherwise.")
    use_fbcache: bool = _runtime(False, "First-Block-Cache: skip blocks while the first block's output changes little.")
    use_teacache: bool = _runtime(False, "TeaCache: skip blocks in some steps; for models with known coefficients.")
    cache_threshold: float | None = _runtime(None, "Change below which a cache skips blocks; default: the cache's own.")
    rel_l1_thresh: float | None = _runtime(None, "Older name of --cache_threshold.")
    use_parallel_vae: bool = _runtime(False, "Divide VAE encoding and decoding over ranks by rows of the image.")
    vae_engine: str = _runtime("auto", "Engine of the parallel VAE: auto, native, or distvae (a separate package).")
    vae_split: str = _runtime("auto", "Dimension that the parallel VAE divides: height, width, or auto (the longer).")
    vae_chunk_rows: str | int | None = _runtime(None, "Rows the parallel VAE computes at once, or auto; bounds memory.")
    use_torch_compile: bool = _runtime(False, "Compile transformer blocks with torch.compile, once per block class.")
    use_onediff: bool = _runtime(False, "Not supported: OneDiff is no longer maintained.")
    seed: int = _runtime(42, "Random seed of the noise.")
    output_type: str = _runtime("pil", "Output type of the pipeline: pil, pt, np or latent.")
    attention_backend: str = _runtime(
        "auto",
        "Attention kernel: auto, sdpa, flash, efficient, cudnn, math, flash_attn, flash_attn_3, or the name of a"
        " Diffusers attention backend, such as flex or sage.",
    )
    enable_model_cpu_offload: bool = _runtime(False, "Keep each model on the CPU while it is not in use.")
    enable_sequential_cpu_offload: bool = _runtime(False, "Keep each layer on the CPU while it is not in use.")
    enable_tiling: bool = _runtime(False, "Decode in tiles: needs less memory; the image is close to the untiled one.")
    enable_slicing: bool = _runtime(False, "Decode one image at a time: needs less memory.")
    text_encoder: str = _runtime("replicate", f"Placement of the text encoders: {', '.join(TEXT_ENCODER_MODES)}.")
    memory: str | None = _runtime(None, "Memory that each rank may use, such as 24GB; default: the accelerator's.")
    use_fp8_t5_encoder: bool = _runtime(False, "Store the T5 text encoder's weights in FP8.")
    dtype: str = _runtime("auto", "Weight dtype: float32, float16, bfloat16; auto is bfloat16 on a GPU, else float32.")

    auto: bool = _parallel(False, "Let the planner choose the fastest exact degrees for the number of ranks.")
    allow_stale: bool = _parallel(False, "Let --auto also choose methods that change the image slightly.")
    do_classifier_free_guidance: bool = _parallel(True, "Use classifier-free guidance (--no_... disables it).")
    use_cfg_parallel: bool = _parallel(False, "Compute the two guidance branches on two groups of ranks.")
    use_split_batch: bool = _parallel(False, "Older name of --use_cfg_parallel.")
    data_parallel_degree: int = _parallel(1, "Data parallelism: replicas over which the images are divided.")
    ulysses_degree: int = _parallel(1, "Ulysses: ranks that divide the sequence; in attention, the heads.")
    ring_degree: int = _parallel(1, "Ring attention: ranks that divide the sequence and pass on keys and values.")
    pipefusion_parallel_degree: int = _parallel(1, "PipeFusion: stages that the transformer's blocks are divided into.")
    num_pipeline_patch: int | None = _parallel(
        None, "PipeFusion: patches of the image; default: the number of stages. One rank can run several, as a preview."
    )
    attn_layer_num_for_pp: list[int] | None = _parallel(None, "PipeFusion: blocks per stage; balanced by default.", "+")
    tensor_parallel_degree: int = _parallel(1, "Tensor parallelism: ranks that divide each layer's weights.")
    tensor_parallel_text_encoder: bool = _parallel(False, "Tensor parallelism: also divide the text encoders' weights.")
    distrifusion_degree: int = _parallel(1, "DistriFusion: ranks that divide the image and use stale activations.")
    distrifusion_mode: str = _parallel(ASYNCHRONOUS, f"DistriFusion synchronization: {', '.join(MODES)}.")
    naive_patch_degree: int = _parallel(1, "Naive patches (a baseline): ranks that compute image parts independently.")
    split_scheme: str | None = _parallel(
        None,
        "Naive patches: cut by row (default), col, or alternate (changes each step). Tensor parallelism: divide each"
        " layer's outputs (col) or inputs (row); default: pairs of both.",
    )
    fully_shard_degree: int = _parallel(
        1, "FSDP: ranks that shard the transformer's weights and gather them per block: 1, or all of a replica."
    )

    height: int | None = _input(None, "Height of the image in pixels; default: the model's own.")
    width: int | None = _input(None, "Width of the image in pixels; default: the model's own.")
    num_frames: int | None = _input(None, "Number of frames of a video; default: the model's own.")
    prompt: str | list[str] = _input("", "What to generate; several prompts generate several images.", "*")
    negative_prompt: str | list[str] = _input("", "What to avoid: one text for all prompts, or one for each.", "*")
    no_use_resolution_binning: bool = _input(False, "Use the given size, not the nearest one seen in training.")
    num_inference_steps: int | None = _input(20, "Number of denoising steps.")
    max_sequence_length: int | None = _input(256, "Maximum length of a prompt in tokens.")
    guidance_scale: float = _input(3.5, "Guidance scale: how closely to follow the prompt.")
    img_file_path: str | None = _input(None, "Input image, for image-to-image pipelines.")

    @staticmethod
    def add_cli_args(parser: argparse.ArgumentParser) -> argparse.ArgumentParser:
        """Add every field as a flag; returns the parser."""
        groups: dict[str, Any] = {}
        types = typing.get_type_hints(xFuserArgs)
        for spec in fields(xFuserArgs):
            group = spec.metadata["group"]
            if group not in groups:
                groups[group] = parser.add_argument_group(group)
            options = {"default": spec.default, "help": _help(spec)}
            if types[spec.name] is bool:
                options["action"] = SwitchAction
            else:
                options |= {"type": _item_type(types[spec.name]), "nargs": spec.metadata["nargs"]}
                options["metavar"] = spec.name.split("_")[-1].upper()
            groups[group].add_argument(f"--{spec.name}", **options)
        return parser

    @classmethod
    def from_cli_args(cls, args: argparse.Namespace) -> "xFuserArgs":
        """Create the arguments from a parsed namespace; attributes that it lacks keep their default."""
        return cls(**{spec.name: getattr(args, spec.name, spec.default) for spec in fields(cls)})

    def create_config(self) -> tuple[EngineConfig, InputConfig]:
        """Check all options, then join the run's process group; returns the configurations for :class:`xDiTParallel`.

        Raises:
            ValueError: values are invalid, do not fit each other or the number of ranks, or require something that is
                not available. No process group is created then.
        """
        fail_together()
        if self.auto:
            check_types(self)
            return self._chosen().create_config()
        configs = self.checked(launched_world_size())
        init_distributed_environment()
        return configs

    def _chosen(self) -> "xFuserArgs":
        """These arguments with degrees chosen by the planner, the same on all ranks."""
        replace(self, fully_shard_degree=min(1, self.fully_shard_degree), tensor_parallel_text_encoder=False).checked()
        if not self.model:
            raise ValueError("auto requires model: it plans from the configuration of a pipeline")
        init_distributed_environment()
        return importlib.import_module(PLANNER).chosen(self)  # by name: the planner imports this module

    def checked(self, world_size: int | None = None) -> tuple[EngineConfig, InputConfig]:
        """As :meth:`create_config`, but without process groups; without ``world_size``, any number of ranks passes."""
        check_types(self)
        self._check_auto()
        if self.use_onediff:
            raise ValueError("use_onediff: OneDiff is no longer maintained, and is not supported; remove it")
        if self.use_torch_compile and (lacks := compiler.missing()):
            raise ValueError(f"use_torch_compile: {lacks}; or remove it")
        check_backend(self.attention_backend)
        parallel = self._parallel_config()
        parallel.check(parallel.world_size if world_size is None else world_size)
        given = self._fields_of(InputConfig) | {"use_cfg_parallel": parallel.cfg_degree > 1}
        if self.model and shipped_folder(self.model):  # without a name, it may be the caller's own pipeline
            given |= {name: SHIPPED_SIDE for name in ("height", "width") if given[name] is None}
        inputs = InputConfig(**given, use_resolution_binning=not self.no_use_resolution_binning)
        inputs.check()
        stale = parallel.pipelined or parallel.distrifusion_degree > 1
        most = self.num_inference_steps if stale and self.num_inference_steps else math.inf
        if not 0 <= self.warmup_steps <= most:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be from 0 to num_inference_steps={self.num_inference_steps}"
            )
        self._check_cache()
        folder = shipped_folder(self.model) or os.fspath(self.model)
        model = ModelConfig(folder, self.download_dir, self.trust_remote_code)
        teacache = self.use_teacache and bool(self.model)
        asked = parallel.sequenced, parallel.pipelined, parallel.patched, parallel.divides
        check_folder(model.model, *asked, teacache)
        return EngineConfig(model, self._runtime_config(), parallel), inputs

    def _check_auto(self) -> None:
        if self.allow_stale and not self.auto:
            raise ValueError("allow_stale requires auto: add it, or choose the degrees of a stale method")
        given = [name for name in (*(one.flag for one in DEGREES.values()), "use_split_batch") if self._is_given(name)]
        if self.auto and given:
            raise ValueError(
                f"auto chooses the degrees, and {given[0]}={getattr(self, given[0])!r} is given: remove one"
            )

    def _parallel_config(self) -> ParallelConfig:
        guided_in_parallel = self.use_cfg_parallel or self.use_split_batch
        if guided_in_parallel and not self.do_classifier_free_guidance:
            raise ValueError(
                "use_cfg_parallel needs classifier-free guidance, which do_classifier_free_guidance=False switches"
                " off: remove one of them"
            )
        patches, layers = self.num_pipeline_patch, self.attn_layer_num_for_pp
        return ParallelConfig(
            **self._fields_of(ParallelConfig)
            | {names.field: getattr(self, names.flag) for names in DEGREES.values()}
            | {
                "cfg_degree": 2 if guided_in_parallel else 1,
                "num_pipeline_patch": self.pipefusion_parallel_degree if patches is None else patches,
                "attn_layer_num_for_pp": tuple(layers) if layers else None,
            }
        )

    def _runtime_config(self) -> RuntimeConfig:
        check_known("dtype", self.dtype, DTYPES)
        check_known("text_encoder", self.text_encoder, TEXT_ENCODER_MODES)
        rows = self.vae_chunk_rows
        rows = int(rows) if isinstance(rows, str) and rows.isdigit() else rows
        check_engine(self.vae_engine, self.vae_split, rows)
        for name in ("vae_engine", "vae_split", "vae_chunk_rows"):
            if self._is_given(name) and not self.use_parallel_vae:
                raise ValueError(f"{name}={getattr(self, name)!r} requires use_parallel_vae: add it")
        self._check_weights()
        return RuntimeConfig(
            **self._fields_of(RuntimeConfig)
            | {
                "dtype": DTYPES[self.dtype] or devices.default_dtype(),
                "cache_threshold": self._given_threshold,
                "vae_chunk_rows": rows,
                "memory": None if self.memory is None else in_bytes(self.memory),
            }
        )

    @property
    def _given_threshold(self) -> float | None:
        return self.rel_l1_thresh if self.cache_threshold is None else self.cache_threshold

    def _check_cache(self) -> None:
        """Raise a ValueError for caches that exclude each other, and for thresholds that no cache uses."""
        threshold = self._given_threshold
        if self.use_fbcache and self.use_teacache:
            raise ValueError("use_fbcache and use_teacache are two ways to decide the same: remove one of them")
        if self.cache_threshold is not None and self.rel_l1_thresh not in (None, self.cache_threshold):
            raise ValueError(
                f"cache_threshold={self.cache_threshold} and rel_l1_thresh={self.rel_l1_thresh} set the same value:"
                " give one of them"
            )
        if threshold is not None and not (self.use_fbcache or self.use_teacache):
            raise ValueError(f"cache_threshold={threshold} requires use_fbcache or use_teacache: add one of them")
        if threshold is not None and not 0 <= threshold < math.inf:
            raise ValueError(f"cache_threshold={threshold} must be a number of 0 or more")

    def _check_weights(self) -> None:
        """Raise a ValueError for options that place the same weights differently."""
        offloads = ("enable_model_cpu_offload", "enable_sequential_cpu_offload")
        exclusive = [offloads]
        exclusive += [(name, "tensor_parallel_text_encoder") for name in ("use_fp8_t5_encoder", "text_encoder")]
        if self.text_encoder in ("shard", "offload"):
            exclusive += [("text_encoder", name) for name in (*offloads, "use_fp8_t5_encoder")]
        for one, other in exclusive:
            if self._is_given(one) and self._is_given(other):
                raise ValueError(
                    f"{one}={getattr(self, one)!r} and {other}={getattr(self, other)!r} exclude each other: remove one"
                )
        if self.enable_sequential_cpu_offload and self.tensor_parallel_degree > 1:
            raise ValueError(
                "enable_sequential_cpu_offload moves full layers, which tensor_parallel_degree divides: use"
                " enable_model_cpu_offload with it"
            )
        if any(map(self._is_given, offloads)) and devices.device_type() == "cpu":
            raise ValueError("CPU offload needs an accelerator to offload from; this machine has none")

    def _is_given(self, name: str) -> bool:
        return getattr(self, name) != self.__dataclass_fields__[name].default

    def _fields_of(self, config: type) -> dict[str, Any]:
        """The values of the fields that a configuration class shares with this class."""
        return {spec.name: getattr(self, spec.name) for spec in fields(config) if hasattr(self, spec.name)}


def _item_type(hint: Any) -> type:
    """The type that a flag's value is parsed as: the first plain type in the field's annotation."""
    while typing.get_args(hint):
        hint = typing.get_args(hint)[0]
    return hint


def _help(spec: Any) -> str:
    text = spec.metadata["help"]
    if spec.name == "attention_backend":
        text += f" Available here: {', '.join(available_backends())}."
    return text if spec.default in (None, "", False) else f"{text} (default: {spec.default})"
