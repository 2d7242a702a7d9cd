"""The flags: every field of one dataclass is a flag, and its help, group and type stand beside it."""

import argparse
import os
import re
import typing
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from xfuser.config.config import (
    ASYNCHRONOUS,
    MODES,
    EngineConfig,
    InputConfig,
    ModelConfig,
    ParallelConfig,
    RuntimeConfig,
)
from xfuser.config.parser import SwitchAction
from xfuser.core import compiler, device as devices
from xfuser.core.attention.kernels import available_backends, check_backend
from xfuser.core.distributed import init_distributed_environment, launched_world_size
from xfuser.core.distributed.failure import fail_together
from xfuser.models.registry import check_folder
from xfuser.vae.engines import check_engine

DTYPES = {
    "auto": None,
    "float32": torch.float32,
    "fp32": torch.float32,
    "float16": torch.float16,
    "fp16": torch.float16,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
}
TEXT_ENCODER_MODES = ("replicate", "shard", "rank0", "offload")
SHIPPED = os.path.join(os.path.dirname(os.path.dirname(__file__)), "assets")
SHIPPED_PIPELINE = os.path.join(SHIPPED, "shapes-256")
SHIPPED_SIDE = 256  # pixels that the shipped pipelines were trained with


def shipped_folder(model: str | None) -> str | None:
    """Folder of a pipeline that comes with the package, given by it, by its name, or None for the default one.

    None where the model is another one.
    """
    if not model:
        return SHIPPED_PIPELINE
    folder = model if os.path.exists(model) else os.path.join(SHIPPED, model)
    return folder if os.path.dirname(os.path.abspath(folder)) == SHIPPED and os.path.isdir(folder) else None


def _flag(group: str, default: Any, help: str, nargs: str | None = None) -> Any:
    return field(default=default, metadata={"group": group, "help": help, "nargs": nargs})


def _model(default: Any, help: str) -> Any:
    return _flag("Model Options", default, help)


def _runtime(default: Any, help: str) -> Any:
    return _flag("Runtime Options", default, help)


def _parallel(default: Any, help: str, nargs: str | None = None) -> Any:
    return _flag("Parallel Processing Options", default, help, nargs)


def _input(default: Any, help: str, nargs: str | None = None) -> Any:
    return _flag("Input Options", default, help, nargs)


@dataclass
class xFuserArgs:
    """What a user may ask for; :meth:`create_config` checks it and turns it into configuration objects."""

    model: str | None = _model(
        None,
        f"Folder or hub name of a Diffusers pipeline, or a shipped one: {', '.join(sorted(os.listdir(SHIPPED)))};"
        " shapes-256 if not given.",
    )
    download_dir: str | None = _model(None, "Folder for what is downloaded from the hub.")
    trust_remote_code: bool = _model(False, "Allow a pipeline's own code from the hub.")

    warmup_steps: int = _runtime(
        1, "Synchronous first steps of PipeFusion and DistriFusion; no effect on other methods."
    )
    use_parallel_vae: bool = _runtime(False, "Encode and decode with the rows of the picture divided over ranks.")
    vae_engine: str = _runtime("auto", "Parallel VAE: auto, native, or the package distvae.")
    vae_split: str = _runtime("auto", "Parallel VAE: divide height, width, or auto, the longer one.")
    vae_chunk_rows: str | int | None = _runtime(
        None, "Parallel VAE: rows that a convolution computes at a time, or auto; bounds memory, also on one rank."
    )
    use_torch_compile: bool = _runtime(False, "Compile the transformer's blocks, each class of blocks once.")
    use_onediff: bool = _runtime(False, "Refused: OneDiff is no longer maintained.")
    seed: int = _runtime(42, "Seed of the noise.")
    output_type: str = _runtime("pil", "What the pipeline returns: pil, pt, np or latent.")
    attention_backend: str = _runtime(
        "auto", "Attention kernel: auto, sdpa, flash, efficient, cudnn, math, flash_attn or flash_attn_3."
    )
    enable_model_cpu_offload: bool = _runtime(False, "Keep models on the CPU while they are not in use.")
    enable_sequential_cpu_offload: bool = _runtime(False, "Keep layers on the CPU while they are not in use.")
    enable_tiling: bool = _runtime(False, "Decode in tiles: less memory, close to the whole picture.")
    enable_slicing: bool = _runtime(False, "Decode one image at a time: less memory.")
    text_encoder: str = _runtime(
        "replicate",
        "Text encoders: replicate on all ranks, shard over them, rank0 has them, or offload when prompts are encoded.",
    )
    memory: str | None = _runtime(
        None, "Memory that a rank may use, such as 24GB; that of its accelerator if not given. Less is not tried."
    )
    use_fp8_t5_encoder: bool = _runtime(False, "Store the T5 text encoder's weights in 8 bits.")
    dtype: str = _runtime("auto", "Weights: float32, float16, bfloat16; auto is bfloat16 on a GPU, else float32.")

    do_classifier_free_guidance: bool = _parallel(True, "Guide by the prompt (--no_... switches guidance off).")
    use_cfg_parallel: bool = _parallel(False, "Compute guidance's two branches on two groups of ranks.")
    use_split_batch: bool = _parallel(False, "Older name of --use_cfg_parallel.")
    data_parallel_degree: int = _parallel(1, "Replicas among which the images are shared.")
    ulysses_degree: int = _parallel(1, "Ranks that share a sequence by attention heads.")
    ring_degree: int = _parallel(1, "Ranks that share a sequence by blocks of keys and values.")
    pipefusion_parallel_degree: int = _parallel(1, "Stages into which the transformer's blocks are divided.")
    num_pipeline_patch: int | None = _parallel(
        None, "Patches of the image in PipeFusion; as many as stages if not given. Works on one rank, as a preview."
    )
    attn_layer_num_for_pp: list[int] | None = _parallel(
        None, "Blocks of each PipeFusion stage; balanced by time if not given.", "+"
    )
    tensor_parallel_degree: int = _parallel(1, "Ranks that share each layer's weights.")
    tensor_parallel_text_encoder: bool = _parallel(False, "Share the weights of the text encoders as well.")
    distrifusion_degree: int = _parallel(
        1, "Ranks that each compute a part of the picture, from the others' keys and values of the last step."
    )
    distrifusion_mode: str = _parallel(ASYNCHRONOUS, f"What DistriFusion waits for: {', '.join(MODES)}.")
    naive_patch_degree: int = _parallel(
        1, "Ranks that each compute a part of the picture as if it were all; a baseline that shows its seams."
    )
    split_scheme: str | None = _parallel(
        None,
        "Naive patches are cut by row, col, or alternate (step by step); row if not given. Tensor parallelism divides"
        " each layer's outputs (col) or inputs (row); pairs of both if not given.",
    )

    fully_shard_degree: int = _parallel(
        1, "Ranks that divide the transformer's weights and gather them block by block: all of a replica, or 1."
    )

    height: int | None = _input(None, "Height of the image in pixels; the model's own if not given.")
    width: int | None = _input(None, "Width of the image in pixels; the model's own if not given.")
    num_frames: int | None = _input(None, "Frames of a video; the model's own if not given.")
    prompt: str | list[str] = _input("", "What to draw; several prompts draw several pictures.", "*")
    negative_prompt: str | list[str] = _input("", "What not to draw: one for all prompts, or one each.", "*")
    no_use_resolution_binning: bool = _input(False, "Draw the very size asked for, not the nearest trained one.")
    num_inference_steps: int = _input(20, "Denoising steps.")
    max_sequence_length: int = _input(256, "Longest prompt in tokens.")
    guidance_scale: float = _input(3.5, "Strength of the guidance by the prompt.")
    img_file_path: str | None = _input(None, "Picture to start from, for image-to-image pipelines.")

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
        """From a parsed namespace; attributes that it lacks keep their default."""
        return cls(**{spec.name: getattr(args, spec.name, spec.default) for spec in fields(cls)})

    def create_config(self) -> tuple[EngineConfig, InputConfig]:
        """Check everything, then join the run's process group; returns what :class:`xDiTParallel` takes.

        Raises:
            ValueError: for values that are wrong, do not fit together or the number of ranks, or ask for what is
                not available. No process group exists then.
        """
        fail_together()
        configs = self.checked(launched_world_size())
        init_distributed_environment()
        return configs

    def checked(self, world_size: int | None = None) -> tuple[EngineConfig, InputConfig]:
        """As :meth:`create_config`, without touching process groups; any number of ranks where none is given."""
        self._refuse_unavailable()
        check_backend(self.attention_backend)
        parallel = ParallelConfig(
            **self._fields_of(ParallelConfig)
            | {
                "dp_degree": self.data_parallel_degree,
                "cfg_degree": 2 if self._guidance_in_parallel() else 1,
                "pp_degree": self.pipefusion_parallel_degree,
                "tp_degree": self.tensor_parallel_degree,
                "num_pipeline_patch": self._patches(),
                "attn_layer_num_for_pp": tuple(self.attn_layer_num_for_pp) if self.attn_layer_num_for_pp else None,
            }
        )
        parallel.check(parallel.world_size if world_size is None else world_size)
        inputs = self._input_config()
        inputs.check()
        displaced = parallel.pipelined or parallel.distrifusion_degree > 1
        if displaced and not 0 <= self.warmup_steps <= self.num_inference_steps:
            raise ValueError(
                f"warmup_steps={self.warmup_steps} must be from 0 to num_inference_steps={self.num_inference_steps}"
            )
        model = ModelConfig(shipped_folder(self.model) or self.model, self.download_dir, self.trust_remote_code)
        check_folder(model.model, parallel.sequenced, parallel.pipelined, parallel.divides)
        return EngineConfig(model, self._runtime_config(), parallel), inputs

    def _guidance_in_parallel(self) -> bool:
        parallel = self.use_cfg_parallel or self.use_split_batch
        if parallel and not self.do_classifier_free_guidance:
            raise ValueError(
                "use_cfg_parallel needs classifier-free guidance, which do_classifier_free_guidance=False switches"
                " off: remove one of them"
            )
        return parallel

    def _patches(self) -> int:
        return self.pipefusion_parallel_degree if self.num_pipeline_patch is None else self.num_pipeline_patch

    def _input_config(self) -> InputConfig:
        given = self._fields_of(InputConfig) | {"use_cfg_parallel": self._guidance_in_parallel()}
        if self.model and shipped_folder(self.model):  # without a name, the pipeline may be one that the caller has
            given |= {name: SHIPPED_SIDE for name in ("height", "width") if given[name] is None}
        return InputConfig(**given, use_resolution_binning=not self.no_use_resolution_binning)

    def _runtime_config(self) -> RuntimeConfig:
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown; known are {', '.join(DTYPES)}")
        if self.warmup_steps < 0:
            raise ValueError(f"warmup_steps={self.warmup_steps} must be 0 or more")
        self._check_vae()
        if self.enable_model_cpu_offload and self.enable_sequential_cpu_offload:
            raise ValueError("enable_model_cpu_offload and enable_sequential_cpu_offload exclude each other")
        if self.enable_sequential_cpu_offload and self.tensor_parallel_degree > 1:
            raise ValueError(
                "enable_sequential_cpu_offload moves whole layers, which tensor_parallel_degree divides: use"
                " enable_model_cpu_offload with it"
            )
        if self.use_fp8_t5_encoder and self.tensor_parallel_text_encoder:
            raise ValueError("use_fp8_t5_encoder and tensor_parallel_text_encoder exclude each other")
        if (self.enable_model_cpu_offload or self.enable_sequential_cpu_offload) and devices.device_type() == "cpu":
            raise ValueError("CPU offload needs an accelerator to offload from; this machine has none")
        self._check_text_encoder()
        return RuntimeConfig(
            **self._fields_of(RuntimeConfig)
            | {
                "dtype": DTYPES[self.dtype] or devices.default_dtype(),
                "vae_chunk_rows": self._chunk_rows(),
                "memory": None if self.memory is None else in_bytes(self.memory),
            }
        )

    def _check_text_encoder(self) -> None:
        mode = self.text_encoder
        if mode not in TEXT_ENCODER_MODES:
            raise ValueError(f"text_encoder={mode!r} is unknown; known are {', '.join(TEXT_ENCODER_MODES)}")
        if mode != "replicate" and self.tensor_parallel_text_encoder:
            raise ValueError(f"text_encoder={mode!r} and tensor_parallel_text_encoder exclude each other: choose one")
        others = ("enable_model_cpu_offload", "enable_sequential_cpu_offload", "use_fp8_t5_encoder")
        for name in others if mode in ("shard", "offload") else ():
            if getattr(self, name):
                raise ValueError(f"text_encoder={mode!r} and {name} both move text encoders: remove one of them")

    def _check_vae(self) -> None:
        check_engine(self.vae_engine, self.vae_split, self._chunk_rows())
        asked = {"vae_engine": "auto", "vae_split": "auto", "vae_chunk_rows": None}
        for name, default in asked.items():
            if getattr(self, name) != default and not self.use_parallel_vae:
                raise ValueError(f"{name}={getattr(self, name)!r} requires use_parallel_vae: add it")

    def _chunk_rows(self) -> int | str | None:
        rows = self.vae_chunk_rows
        return int(rows) if isinstance(rows, str) and rows.isdigit() else rows

    def _fields_of(self, config: type) -> dict[str, Any]:
        """The values of the fields that a configuration class has in common with this one."""
        return {spec.name: getattr(self, spec.name) for spec in fields(config) if hasattr(self, spec.name)}

    def _refuse_unavailable(self) -> None:
        if self.use_onediff:
            raise ValueError("use_onediff: OneDiff is no longer maintained, and is not supported; remove it")
        if self.use_torch_compile and (lacks := compiler.missing()):
            raise ValueError(f"use_torch_compile: {lacks}; or remove it")


def in_bytes(size: str) -> int:
    """``"24GB"`` or ``"22.5 GiB"`` as a number of bytes.

    Raises:
        ValueError: it is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B?", size, flags=re.IGNORECASE)
    if not found:
        raise ValueError(f"memory={size!r} is not a size: give a number with a unit, such as 24GB or 22.5GiB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(unit.upper())))


def _item_type(hint: Any) -> type:
    """What a flag's value is parsed as: the first plain type in the field's annotation."""
    while typing.get_args(hint):
        hint = typing.get_args(hint)[0]
    return hint


def _help(spec: Any) -> str:
    shown = spec.default not in (None, "", False)
    text = spec.metadata["help"]
    if spec.name == "attention_backend":
        text += f" Here: {', '.join(available_backends())}."
    return f"{text} (default: {spec.default})" if shown else text
