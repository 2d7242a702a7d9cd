"""Offloading with the hooks of accelerate and Diffusers, before and after the wrap. The device is the CPU."""

import pytest
import running
import tiny
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_group_offloading

CPU = torch.device("cpu")


def modules(pipe):
    return [part for part in pipe.components.values() if isinstance(part, torch.nn.Module)]


def models(pipe):
    """Offload like enable_model_cpu_offload()."""
    for part in modules(pipe):
        cpu_offload_with_hook(part, CPU)


def layers(pipe):
    """Offload like enable_sequential_cpu_offload()."""
    for part in modules(pipe):
        cpu_offload(part, CPU, offload_buffers=len(part._parameters) > 0)


def groups(pipe):
    apply_group_offloading(pipe.transformer, onload_device=CPU, offload_device=CPU, offload_type="leaf_level")


def draw(path, degrees, call, offload, first):
    """Return an image and unwrap()'s message, or the error of the wrap."""
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    if first:
        offload(pipe)
    try:
        parallel = running.wrap(pipe, degrees)
    except ValueError as error:
        return str(error), ""
    if not first:
        offload(parallel)
    picture = running.array(parallel(**call, generator=running.seeded()))
    told = ""
    try:
        parallel.unwrap()
    except ValueError as error:
        told = str(error)
        parallel.remove_all_hooks()
        parallel.unwrap()
    return picture, told


STAGES = {"pipefusion_parallel_degree": 2, "warmup_steps": 3}
SHARES = {"ulysses_degree": 2, "fully_shard_degree": 2}


@pytest.mark.parametrize(
    ("offload", "first", "degrees", "refusal"),
    [
        (models, True, STAGES, ""),
        (models, False, {"tensor_parallel_degree": 2}, ""),
        (models, True, SHARES | {"text_encoder": "shard"}, ""),
        (models, False, {"ulysses_degree": 2, "text_encoder": "rank0"}, ""),
        (layers, True, {"use_cfg_parallel": True}, ""),
        (layers, False, {"data_parallel_degree": 2}, ""),
        (layers, False, STAGES, "remove_all_hooks"),
        (layers, True, STAGES, "wrap the pipeline first"),
        (layers, True, SHARES, "wrap the pipeline first"),
        (groups, True, STAGES, ""),
        (groups, False, SHARES, ""),
        (groups, True, SHARES, "wrap the pipeline first"),
    ],
)
def test_offloading_goes_with_the_wrap_or_is_told_the_order(pool, folder_of, offload, first, degrees, refusal):
    path, call = folder_of("sd3"), tiny.call_of("sd3", 2)
    for picture, told in pool.run(2, draw, path, degrees, call, offload, first):
        if isinstance(picture, str):
            assert refusal and refusal in picture
        else:
            assert running.error(picture, running.bare(path, call)) <= running.TOLERANCE
            assert told == "" if not refusal else refusal in told
