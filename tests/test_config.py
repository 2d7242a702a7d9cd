"""Flags and their checks."""

import argparse
import dataclasses
from typing import Optional

import numpy as np
import pytest
import torch
import torch.distributed as dist

from xfuser import FlexibleArgumentParser, xFuserArgs


def parse(*flags):
    args = xFuserArgs.add_cli_args(FlexibleArgumentParser(prog="test")).parse_args(list(flags))
    return xFuserArgs.from_cli_args(args)


def test_every_field_is_a_flag_with_help_in_a_group():
    text = xFuserArgs.add_cli_args(FlexibleArgumentParser()).format_help()
    for field in dataclasses.fields(xFuserArgs):
        assert f"--{field.name}" in text
    for group in ("Model Options", "Runtime Options", "Parallel Processing Options", "Input Options"):
        assert group in text


def test_dashes_underscores_and_opposites():
    assert parse("--ulysses-degree", "2").ulysses_degree == 2
    assert parse("--ulysses_degree=2").ulysses_degree == 2
    assert parse("--use-cfg-parallel").use_cfg_parallel
    assert not parse("--use_cfg_parallel", "--no-use-cfg-parallel").use_cfg_parallel
    assert parse("--no_use_resolution_binning").no_use_resolution_binning
    assert not parse("--use-resolution-binning").no_use_resolution_binning
    assert parse("--prompt", "a cat", "a dog").prompt == ["a cat", "a dog"]
    assert parse("--prompt=a--b").prompt == ["a--b"]


def test_missing_attributes_keep_their_defaults():
    args = xFuserArgs.from_cli_args(argparse.Namespace(seed=7))
    assert args.seed == 7 and args.num_inference_steps == 20 and args.guidance_scale == 3.5


def test_config_objects_carry_what_users_read():
    engine, inputs = parse(
        "--model", "folder", "--use_cfg_parallel", "--ulysses_degree", "2", "--ring_degree", "3", "--prompt", "x", "y",
        "--height", "64", "--dtype", "bf16",
    ).checked()  # fmt: skip
    assert engine.model_config.model == "folder"
    parallel = engine.parallel_config
    assert (parallel.cfg_degree, parallel.sp_degree, parallel.ulysses_degree, parallel.ring_degree) == (2, 6, 2, 3)
    assert (parallel.dp_degree, parallel.pp_degree, parallel.tp_degree) == (1, 1, 1)
    assert parallel.world_size == engine.world_size == 12
    assert engine.runtime_config.dtype is torch.bfloat16
    engine.runtime_config.dtype = torch.float16
    assert (inputs.prompt, inputs.height, inputs.width, inputs.batch_size) == (["x", "y"], 64, None, 2)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"ulysses_degree": 2}, r"multiply to 2, but 1 ranks? run.*choose: all degrees 1"),
        ({"ring_degree": 0}, "ring_degree=0 must be a whole number of 1 or more"),
        ({"data_parallel_degree": -2}, "data_parallel_degree=-2"),
        ({"pipefusion_parallel_degree": 2}, "pipefusion_parallel_degree=2 multiply to 2, but 1 ranks? run"),
        (
            {"attn_layer_num_for_pp": [1, 1]},
            r"attn_layer_num_for_pp=\[1, 1\] must name the blocks of each of the 1 stages",
        ),
        ({"attn_layer_num_for_pp": [0]}, r"attn_layer_num_for_pp=\[0\] must name"),
        ({"num_pipeline_patch": 2, "warmup_steps": 21}, "warmup_steps=21 must be from 0 to num_inference_steps=20"),
        ({"tensor_parallel_degree": 2}, "tensor_parallel_degree=2 multiply to 2, but 1 ranks? run"),
        ({"split_scheme": "row"}, "requires tensor_parallel_degree or naive_patch_degree"),
        ({"tensor_parallel_text_encoder": True}, "requires tensor_parallel_degree above 1"),
        (
            {"vae_engine": "best", "use_parallel_vae": True},
            "vae_engine='best' is unknown; known are auto, native, distvae",
        ),
        ({"vae_split": "frames", "use_parallel_vae": True}, "go through frames one after the other"),
        ({"vae_chunk_rows": 0, "use_parallel_vae": True}, "vae_chunk_rows=0 must be auto or a whole number"),
        ({"vae_split": "width"}, "vae_split='width' requires use_parallel_vae"),
        ({"use_onediff": True}, "no longer maintained"),
        ({"output_type": "jpeg"}, "'jpeg' is unknown; known are pil, pt, np, latent"),
        ({"attention_backend": "best"}, "attention_backend='best': unknown; here there are auto, sdpa"),
        ({"dtype": "int3"}, "dtype='int3' is unknown"),
        ({"warmup_steps": -1}, "warmup_steps=-1"),
        ({"height": 0}, "height=0 must be a whole number of 1 or more"),
        ({"num_inference_steps": 0}, "num_inference_steps=0"),
        ({"prompt": ["a", "b", "c"], "negative_prompt": ["x", "y"]}, "2 negative prompts for 3 prompts"),
        ({"use_cfg_parallel": True, "do_classifier_free_guidance": False}, "needs classifier-free guidance"),
        ({"enable_model_cpu_offload": True, "enable_sequential_cpu_offload": True}, "exclude each other"),
        ({"ulysses_degree": "2"}, "ulysses_degree='2' must be a whole number"),
        ({"num_pipeline_patch": 0}, "num_pipeline_patch=0 must be a whole number of 1 or more"),
        ({"height": 1.5}, "height=1.5 must be a whole number"),
        ({"seed": 2**70}, "must fit into 64 bits"),
        ({"prompt": None}, "prompt=None must be a text or a list of texts"),
        ({"model": "/nowhere"}, "'/nowhere' does not exist"),
        ({"model": "~/pipeline"}, "'~/pipeline' does not exist"),
        ({"model": 3}, "model=3 must be a text or None"),
        ({"use_parallel_vae": True, "vae_chunk_rows": 1.5}, "vae_chunk_rows=1.5 must be auto or a whole number"),
        ({"warmup_steps": 1.5}, "warmup_steps=1.5 must be a whole number"),
        ({"seed": "x"}, "seed='x' must be a whole number"),
        ({"use_parallel_vae": "no"}, "use_parallel_vae='no' must be True or False"),
        ({"auto": True, "fully_shard_degree": "2"}, "fully_shard_degree='2' must be a whole number"),
        ({"guidance_scale": "3"}, "guidance_scale='3' must be a number"),
        ({"memory": 24}, "memory=24 must be a text or None"),
        ({"attn_layer_num_for_pp": 2}, "attn_layer_num_for_pp=2 must be a list of whole numbers or None"),
        ({"ulysses_degree": True}, "ulysses_degree=True must be a whole number"),
    ],
)
def test_bad_values_are_refused_before_any_process_group(fields, message):
    with pytest.raises(ValueError, match=message):
        xFuserArgs(**fields).create_config()
    assert not dist.is_initialized()


@dataclasses.dataclass
class MoreArgs(xFuserArgs):
    sizes: dict = dataclasses.field(default_factory=dict)
    scale: Optional[int] = None  # noqa: UP045
    place: "Unknown" = None  # noqa: F821


def test_values_that_only_look_like_others_are_taken():
    given = {"use_parallel_vae": 1, "use_cfg_parallel": np.False_, "seed": np.int64(3), "max_sequence_length": None}
    given |= {"num_inference_steps": None, "pipefusion_parallel_degree": np.int64(1), "num_pipeline_patch": 2}
    config, inputs = MoreArgs(guidance_scale=np.float32(2.5), sizes={"a": 1}, scale=2, **given).checked(1)
    assert config.runtime_config.use_parallel_vae and not inputs.use_cfg_parallel
    assert inputs.seed == 3 and inputs.guidance_scale == 2.5 and inputs.max_sequence_length is None
    assert inputs.num_inference_steps is None  # the pipeline's own
    for value in (2, -1):
        with pytest.raises(ValueError, match=f"use_parallel_vae={value} must be True or False"):
            xFuserArgs(use_parallel_vae=value).checked(1)


@pytest.mark.parametrize(
    ("index", "message"),
    [("{", "model_index.json cannot be read as JSON"), ("[]", "holds a list"), ("{}", "does not name the pipeline's")],
)
def test_a_broken_index_is_named(tmp_path, index, message):
    (tmp_path / "model_index.json").write_text(index)
    with pytest.raises(ValueError, match=message):
        xFuserArgs(model=tmp_path).create_config()


def test_refusal_lists_the_legal_choices(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ValueError) as refused:
        xFuserArgs(ulysses_degree=3).checked(4)
    for choice in ("cfg 2 x ulysses 2", "ulysses 4", "ring 4", "dp 2 x ring 2", "ulysses 2 x ring 2", "pipefusion 4"):
        assert choice in str(refused.value)


@pytest.mark.skipif(torch.accelerator.is_available(), reason="cuda kernels are there")
@pytest.mark.parametrize("name", ["cudnn", "efficient", "flash_attn"])
def test_unavailable_backends_say_why(name):
    with pytest.raises(ValueError, match=r"(no accelerator|not installed).*here there are auto, sdpa, flash, math"):
        xFuserArgs(attention_backend=name).checked()


@pytest.mark.skipif(torch.accelerator.is_available(), reason="expects a machine without cuda")
def test_offload_needs_an_accelerator():
    with pytest.raises(ValueError, match="CPU offload needs an accelerator"):
        xFuserArgs(enable_model_cpu_offload=True).create_config()


@pytest.mark.parametrize("flags", [("--height", "tall"), ("--no_such_flag",), ("--seed",)])
def test_unreadable_flags_raise(flags):
    with pytest.raises(ValueError, match="--help lists the flags"):
        parse(*flags)
