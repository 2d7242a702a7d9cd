"""Every family under every method equals the unwrapped pipeline with the same seed, on awkward shapes."""

import diffusers
import numpy as np
import pytest
import running
import tiny
import torch

METHODS = {
    "one-rank": (1, {}),
    "dp2": (2, {"data_parallel_degree": 2}),
    "cfg2": (2, {"use_cfg_parallel": True}),
    "ulysses2": (2, {"ulysses_degree": 2}),
    "ring2": (2, {"ring_degree": 2}),
    "ulysses2-ring2": (4, {"ulysses_degree": 2, "ring_degree": 2}),
    "cfg2-ulysses2": (4, {"use_cfg_parallel": True, "ulysses_degree": 2}),
    "cfg2-ring2": (4, {"use_cfg_parallel": True, "ring_degree": 2}),
    "dp2-ring2": (4, {"data_parallel_degree": 2, "ring_degree": 2}),
    "dp2-cfg2": (4, {"data_parallel_degree": 2, "use_split_batch": True}),
    "dp4": (4, {"data_parallel_degree": 4}),
    "ulysses4": (4, {"ulysses_degree": 4}),  # more ranks than heads
    "ring4": (4, {"ring_degree": 4}),
    "ring3": (3, {"ring_degree": 3}),
}


# One family runs every method, the others a covering set: the matrix has the rest.
COVERING = ("cfg2-ulysses2", "dp2-cfg2", "ring3")
CELLS = [
    (family, method) for family in tiny.FAMILIES for method in METHODS
    if method in COVERING or family == "flux"
]  # fmt: skip


def check(pool, path, method, call, scheduler=None):
    ranks, degrees = METHODS[method]
    expected = running.bare(path, call, scheduler)
    for result in pool.run(ranks, running.wrapped, path, degrees, call, scheduler):
        assert running.error(result, expected) <= running.TOLERANCE


@pytest.mark.parametrize(("family", "method"), CELLS)
def test_family_under_method(pool, folder_of, family, method):
    images = 3 if "dp" in method else 1
    check(pool, folder_of(family), method, tiny.call_of(family, images))


@pytest.mark.parametrize("method", ["cfg2", "ulysses2-ring2", "dp2-cfg2"])
@pytest.mark.parametrize("family", ["flux", "hunyuan_dit", "pixart_alpha"])
def test_batch_of_three(pool, folder_of, family, method):
    check(pool, folder_of(family), method, tiny.call_of(family, 3, num_inference_steps=2))


def test_several_images_per_prompt(pool, folder_of):
    check(pool, folder_of("sd3"), "dp2-ring2", tiny.call_of("sd3", 1, num_images_per_prompt=3))


@pytest.mark.parametrize(
    ("family", "scheduler"),
    [
        ("pixart_sigma", "DDPMScheduler"),
        ("pixart_sigma", "UniPCMultistepScheduler"),
        ("pixart_alpha", "EulerAncestralDiscreteScheduler"),
        ("pixart_alpha", "HeunDiscreteScheduler"),
        ("hunyuan_dit", "DDPMScheduler"),
        ("dit", "DPMSolverMultistepScheduler"),
        ("sd3", "FlowMatchHeunDiscreteScheduler"),
    ],
)
def test_scheduler(pool, folder_of, family, scheduler):
    """Noise sampled within a step, and several calls per step, are the same on all ranks.

    The guidance scale is low, as the first step of some schedulers amplifies rounding a hundredfold.
    """
    call = tiny.call_of(family, 1 if family == "sd3" else 3, guidance_scale=1.5)
    check(pool, folder_of(family), "dp2-cfg2", call, getattr(diffusers, scheduler))


@pytest.mark.parametrize("method", ["cfg2", "cfg2-ring2", "dp2-cfg2"])
@pytest.mark.parametrize("images", [1, 3])
def test_sequential_guidance(pool, folder_of, method, images):
    """Flux with true CFG calls its transformer twice per step."""
    call = tiny.call_of("flux", images, true_cfg_scale=2.5, negative_prompt=["a cat"] * images)
    check(pool, folder_of("flux"), method, call)


def test_skip_layer_guidance(pool, folder_of):
    """SD3 may add a second call to some steps, with another batch size and without the first block."""
    call = tiny.call_of("sd3", 1, num_inference_steps=4, skip_guidance_layers=[0])
    call |= {"skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.8}
    check(pool, folder_of("sd3"), "cfg2-ulysses2", call)


@pytest.mark.parametrize("length", [1, 3, 127])
@pytest.mark.parametrize("method", ["ulysses2", "ring2", "ulysses4"])
def test_text_length_of_joint_attention(pool, folder_of, method, length):
    check(pool, folder_of("flux"), method, tiny.call_of("flux", max_sequence_length=length))


@pytest.mark.parametrize("size", [(16, 16), (16, 48), (16, 64), (112, 80)])
@pytest.mark.parametrize("method", ["ulysses2-ring2", "ring3"])
@pytest.mark.parametrize("family", ["pixart_sigma", "sd3", "flux", "hunyuan_dit"])
def test_resolution(pool, folder_of, family, method, size):
    """Down to one image token, which is fewer than ranks."""
    height, width = size
    check(pool, folder_of(family), method, tiny.call_of(family, height=height, width=width, num_inference_steps=2))


def test_second_call_of_another_shape(pool, folder_of):
    calls = [tiny.call_of("sd3", 1), tiny.call_of("sd3", 2, height=64, num_inference_steps=2), tiny.call_of("sd3", 1)]
    expected = [running.bare(folder_of("sd3"), call) for call in calls]
    degrees = METHODS["cfg2-ulysses2"][1]
    for results in pool.run(4, running.wrapped_calls, folder_of("sd3"), degrees, calls):
        for result, reference in zip(results, expected, strict=True):
            assert running.error(result, reference) <= running.TOLERANCE


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_image_to_image(pool, folder_of, family):
    expected = running.image_to_image(folder_of(family), None)
    for result in pool.run(4, running.image_to_image, folder_of(family), METHODS["dp2-ring2"][1]):
        assert running.error(result, expected) <= running.TOLERANCE


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_inpaint(pool, folder_of, family):
    expected = running.inpaint(folder_of(family), None)
    for result in pool.run(4, running.inpaint, folder_of(family), METHODS["cfg2-ulysses2"][1]):
        assert running.error(result, expected) <= running.TOLERANCE


def test_controlnet(pool, folder_of):
    """Residuals of a ControlNet are added between the blocks at full size."""
    expected = running.controlnet(folder_of("sd3"), None)
    changed = running.error(expected, running.bare(folder_of("sd3"), tiny.call_of("sd3", 2)))
    assert changed > 1e-3  # the ControlNet has an effect
    for result in pool.run(4, running.controlnet, folder_of("sd3"), METHODS["cfg2-ulysses2"][1]):
        assert running.error(result, expected) <= running.TOLERANCE


@pytest.mark.parametrize("method", ["ulysses2", "ring2", "ulysses2-ring2"])
def test_self_attention_mask(pool, folder_of, method):
    """A mask over image tokens hides the last ones, which are uneven among ranks."""
    ranks, degrees = METHODS[method]
    expected = running.masked_forward(folder_of("pixart_sigma"), None)
    assert running.error(expected, running.masked_forward(folder_of("pixart_sigma"), None, hide=0)) > 1e-3
    for result in pool.run(ranks, running.masked_forward, folder_of("pixart_sigma"), degrees):
        assert running.error(result, expected) <= running.TOLERANCE


@pytest.mark.parametrize("backend", ["flash", "math", "sdpa"])
@pytest.mark.parametrize("method", ["one-rank", "ulysses2", "ring2"])
def test_attention_backend(pool, folder_of, method, backend):
    ranks, degrees = METHODS[method]
    call = tiny.call_of("flux")
    expected = running.bare(folder_of("flux"), call)
    for result in pool.run(ranks, running.wrapped, folder_of("flux"), degrees | {"attention_backend": backend}, call):
        assert running.error(result, expected) <= running.TOLERANCE


def test_bfloat16_stays_within_its_rounding(pool, folder_of):
    call = tiny.call_of("flux")
    exact = running.bare(folder_of("flux"), call)
    rounded = running.error(running.bare(folder_of("flux"), call, dtype=torch.bfloat16), exact)
    for method in ("ulysses2", "ring2"):
        ranks, degrees = METHODS[method]
        for result in pool.run(ranks, running.wrapped, folder_of("flux"), degrees, call, None, torch.bfloat16):
            assert running.error(result, exact) <= 2 * rounded


def test_unwrapped_pipeline_is_untouched(pool, folder_of):
    assert all(pool.run(2, running.unwraps_cleanly, folder_of("sd3"), tiny.call_of("sd3")))


def test_unseeded_ranks_draw_the_noise_of_rank_zero(pool, folder_of):
    first, second = pool.run(2, running.unseeded, folder_of("sd3"), METHODS["ulysses2"][1], tiny.call_of("sd3"))
    assert np.array_equal(first, second)
    torch.manual_seed(0)
    pipe = running.loaded(folder_of("sd3"))
    assert running.error(first, pipe(**tiny.call_of("sd3"))[0]) <= running.TOLERANCE


def test_callback_sees_every_step_with_current_latents(pool, folder_of):
    expected = running.callback_latents(folder_of("sd3"), None)
    for seen in pool.run(4, running.callback_latents, folder_of("sd3"), METHODS["dp2-cfg2"][1]):
        assert len(seen) == len(expected) == 3
        for latents, reference in zip(seen, expected, strict=True):
            assert running.error(latents, reference) <= running.TOLERANCE
