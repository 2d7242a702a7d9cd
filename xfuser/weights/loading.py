"""Load a pipeline as configured."""

import inspect
import os
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import diffusers
import torch
import torch.distributed as dist
from diffusers import DiffusionPipeline
from diffusers.utils import HF_MODULES_CACHE
from filelock import FileLock
from packaging.version import Version

from xfuser.config import EngineConfig, InputConfig, checked_config
from xfuser.core import device as devices
from xfuser.core.distributed import get_world_group
from xfuser.core.logger import quiet_libraries
from xfuser.models.registry import check_folder, planned_models
from xfuser.weights.placement import join_groups
from xfuser.weights.skeleton import Folder, divided_transformers, freed_encoders, read
from xfuser.weights.text_encoders import PREFIX, text_encoders

PATIENCE = timedelta(days=7)  # timeout of ranks that wait for a download
LEFT_TO_DIFFUSERS = ("quantization_config", "device_map", "custom_pipeline", "use_flashpack")  # arguments
DTYPE_ARGUMENT = "dtype" if Version(diffusers.__version__) >= Version("0.40") else "torch_dtype"


def load_pipeline(
    engine_config: EngineConfig,
    input_config: InputConfig | None = None,
    pipeline_class: Any = DiffusionPipeline,
    **components: Any,
) -> Any:
    """Load the pipeline of ``engine_config.model_config`` in its dtype, to this rank's device or offloaded from it.

    Each rank loads only the part of the transformer that it keeps under the degrees of ``engine_config``; the pipeline
    must then be wrapped with the same degrees. The ranks of a machine read each file once. All ranks must call this.

    ``components`` replace components of the folder, or are arguments of Diffusers, such as ``variant``. With
    ``input_config.img_file_path``, a text-to-image pipeline becomes its image-to-image variant.

    Raises:
        ValueError: the pipeline is not found or not supported, its files are damaged, or it lacks something that the
            configuration requires. Ranks do not wait for each other then.
    """
    model, runtime = checked_config(engine_config).model_config, engine_config.runtime_config
    join_groups(engine_config)
    options: dict[str, Any] = {DTYPE_ARGUMENT: runtime.dtype, "cache_dir": model.download_dir}
    if model.trust_remote_code:
        options["trust_remote_code"] = True
    options |= components
    try:
        with quiet_libraries():
            if not any(options.get(name) for name in LEFT_TO_DIFFUSERS):
                options |= _parts(engine_config, pipeline_class, options)
            with _turn() if model.trust_remote_code else nullcontext():
                pipe = pipeline_class.from_pretrained(model.model, **options)
    except (AttributeError, ImportError, OSError, ValueError) as error:
        damage = _folder(model.model, options).damage()
        if not damage and not isinstance(error, ImportError | OSError):  # ImportError: a quantiser's package is missing
            raise
        why = damage or error
        raise ValueError(f"model={model.model!r} is not a Diffusers pipeline that can be loaded: {why}") from error
    planned_models(pipe)
    if input_config and input_config.img_file_path:
        pipe = _image_to_image(pipe)
    if runtime.use_fp8_t5_encoder:
        _store_t5_in_fp8(pipe, runtime.dtype)
    for ability in ("enable_tiling", "enable_slicing"):
        if getattr(runtime, ability):
            _enable(pipe, ability)
    _place(pipe, engine_config)
    return pipe


def _turn() -> FileLock:
    """A lock for one process per machine: Diffusers copies a pipeline's own code to a shared folder and runs it."""
    os.makedirs(HF_MODULES_CACHE, exist_ok=True)
    return FileLock(os.path.join(HF_MODULES_CACHE, "xfuser.lock"))


def _parts(engine_config: EngineConfig, pipeline_class: Any, options: dict[str, Any]) -> dict[str, Any]:
    """The components that this package loads itself, by name."""
    parallel, runtime = engine_config.parallel_config, engine_config.runtime_config
    path = _fetched(engine_config.model_config.model, pipeline_class, options)
    check_folder(path, divides=parallel.divides)
    folder = _folder(path, options)
    if pipeline_class is DiffusionPipeline:
        folder.check_class()
    folder.check_files()
    offloads = runtime.enable_model_cpu_offload or runtime.enable_sequential_cpu_offload
    device = torch.device("cpu") if offloads else devices.device(get_world_group().local_rank)
    loads = divided_transformers(folder, parallel)
    memory = runtime.memory or devices.total_memory()
    if memory is not None and not offloads:
        elsewhere = (PREFIX,) if runtime.text_encoder != "replicate" else ()
        size = sum(load.size() for load in loads.values()) + folder.bytes_beside(elsewhere)
        _check_memory(engine_config.model_config.model, size, memory)
    parts = read(loads, device)
    if runtime.text_encoder in ("shard", "rank0") and not get_world_group().is_first_rank:
        parts |= freed_encoders(folder, device)
    return parts


def _folder(path: str, options: dict[str, Any]) -> Folder:
    return Folder(path, options[DTYPE_ARGUMENT], options.get("variant"), set(options))


def _check_memory(model: str, size: int, memory: int) -> None:
    """Raise a ValueError on all ranks if the weights of any rank exceed ``memory``."""
    worst = max(get_world_group().all_gather_object(size))
    if worst > memory:
        sizes = f"the weights of {model!r} that a rank keeps are {worst / 1e9:.2f} GB, memory={memory / 1e9:.2f} GB"
        plan = f"xdit plan --model {model} --world_size {get_world_group().world_size}"
        raise ValueError(f"{sizes}: `{plan}` shows how the degrees and --text_encoder change this")


def _fetched(model: str, pipeline_class: Any, options: dict[str, Any]) -> str:
    """The folder of a pipeline. If it is only on the hub, one rank per machine downloads it before the others go on."""
    if os.path.isdir(model):
        return model
    check_folder(model)
    world = get_world_group()
    waiting = dist.new_group(backend="gloo", timeout=PATIENCE)  # a download may exceed other groups' timeouts
    if world.local_rank > 0:
        dist.barrier(waiting)
    try:
        return pipeline_class.download(model, **options)
    finally:
        if world.local_rank == 0:
            dist.barrier(waiting)
        dist.destroy_process_group(waiting)


def _image_to_image(pipe: Any) -> Any:
    if "image" in inspect.signature(type(pipe).__call__).parameters:
        return pipe
    try:
        return diffusers.AutoPipelineForImage2Image.from_pipe(pipe)
    except ValueError:
        raise ValueError(f"img_file_path: {type(pipe).__name__} has no image-to-image variant") from None


def _enable(pipe: Any, ability: str) -> None:
    vae = getattr(pipe, "vae", None)
    if not hasattr(vae, ability):
        raise ValueError(f"{ability}: the VAE of {type(pipe).__name__} ({type(vae).__name__}) cannot do this")
    getattr(vae, ability)()


def _store_t5_in_fp8(pipe: Any, dtype: torch.dtype) -> None:
    from diffusers.hooks import apply_layerwise_casting

    encoders = [part for part in pipe.components.values() if type(part).__name__ == "T5EncoderModel"]
    if not encoders:
        raise ValueError(f"use_fp8_t5_encoder: {type(pipe).__name__} has no T5 text encoder")
    # T5 reads the dtype of "wo" itself; norms and embeddings are small and sensitive to precision.
    precise = [r"\bwo$", "norm", "shared", "embed", "relative_attention_bias"]
    for encoder in encoders:
        apply_layerwise_casting(
            encoder, storage_dtype=torch.float8_e4m3fn, compute_dtype=dtype, skip_modules_pattern=precise
        )


def _place(pipe: Any, engine_config: EngineConfig) -> None:
    runtime, device = engine_config.runtime_config, devices.device(get_world_group().local_rank)
    if runtime.text_encoder in ("shard", "offload"):  # the wrap places the text encoders, one at a time
        for name in pipe.components.keys() - text_encoders(pipe).keys():
            part = getattr(pipe, name)
            if isinstance(part, torch.nn.Module):
                part.to(device)
    elif runtime.enable_sequential_cpu_offload:
        pipe.enable_sequential_cpu_offload(device=device)
    elif runtime.enable_model_cpu_offload:
        pipe.enable_model_cpu_offload(device=device)
    else:
        pipe.to(device)
