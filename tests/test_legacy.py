"""The interface of the first generation gives the same images as the flags of the same method."""

import pytest
import running
import tiny
import torch
from hypothesis import given, settings, strategies as st

import xfuser.legacy as legacy

STEPS = 3
METHODS = {
    "patch": ({"mode": "no_sync"}, {"distrifusion_degree": 2, "distrifusion_mode": "no_sync"}),
    "naive_patch": ({"split_scheme": "col"}, {"naive_patch_degree": 2, "split_scheme": "col"}),
    "pipefusion": ({"pp_num_patch": 3}, {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 3}),
    "sequence": ({"ulysses_degree": 1}, {"ring_degree": 2}),
    "tensor": ({}, {"tensor_parallel_degree": 2}),
}


def draw(name, path, options, call):
    config = legacy.DistriConfig(height=80, width=48, warmup_steps=1, use_resolution_binning=False, **options)
    pipe = getattr(legacy, name).from_pretrained(distri_config=config, pretrained_model_name_or_path=path)
    pipe.set_progress_bar_config(disable=True)
    picture = running.array(pipe(**call, generator=running.seeded()))
    pipe.unwrap()
    return picture


@pytest.mark.parametrize("method", METHODS)
def test_each_method_draws_what_its_flags_draw(pool, folder_of, method):
    options, degrees = METHODS[method]
    path, call = folder_of("pixart_alpha", True), tiny.call_of("pixart_alpha", num_inference_steps=STEPS)
    said = {name: value for name, value in call.items() if name not in ("height", "width", "use_resolution_binning")}
    assert len(said) == len(call) - 3
    asked = degrees | {"use_cfg_parallel": True, "warmup_steps": 1}
    (expected, *_) = pool.run(4, running.wrapped, path, asked, call)
    for picture in pool.run(4, draw, "DistriPixArtAlphaPipeline", path, {"parallelism": method} | options, said):
        assert running.error(picture, expected) <= running.TOLERANCE


@pytest.mark.parametrize(
    ("name", "family"),
    [("DistriSD3Pipeline", "sd3"), ("DistriDiTPipeline", "dit"), ("DistriHunyuanDiTPipeline", "hunyuan_dit")],
)
def test_other_pipelines_equal_the_bare_one(pool, folder_of, name, family):
    path, call = folder_of(family), tiny.call_of(family, num_inference_steps=STEPS)
    options = {"parallelism": "sequence", "split_batch": False}
    for picture in pool.run(2, draw, name, path, options, call):
        assert running.error(picture, running.bare(path, call)) <= running.TOLERANCE


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"parallelism": "row"}, "known are pipefusion, patch, naive_patch, tensor, sequence"),
        ({"scheduler": "best"}, "scheduler='best' is unknown; known are ddim"),
        ({"mode": "async"}, "distrifusion_mode='async' is unknown"),
    ],
)
def test_bad_values_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        legacy.DistriConfig(**options)


@settings(max_examples=40, deadline=None)
@given(
    st.integers(1, 3), st.integers(1, 3), st.integers(0, 3), st.integers(1, 2), st.integers(0, 9),
    st.sampled_from(["zeros", "reflect", "circular"]),
)  # fmt: skip
def test_convolution_in_blocks_equals_the_whole(kernel, stride, padding, dilation, block, mode):
    torch.manual_seed(0)
    options = {"stride": stride, "padding": padding, "dilation": dilation, "padding_mode": mode}
    whole = torch.nn.Conv2d(2, 3, kernel, **options)
    blocks = legacy.PatchConv2d(2, 3, kernel, block_size=block, **options)
    blocks.load_state_dict(whole.state_dict())
    x = torch.randn(2, 2, 11, 7)
    assert torch.allclose(blocks(x), whole(x), atol=1e-6)
