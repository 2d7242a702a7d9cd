"""Whole pipelines of the model zoo equal one device; ``--matrix`` runs all of them under all methods."""

import pytest
import running
import torch
import whole
from whole import WHOLE

from xfuser.models.registry import PLANS
from xfuser.testing.zoo import FAMILIES
from xfuser.vae.engines import PROVEN

METHODS = {
    "ulysses2": {"ulysses_degree": 2, "use_parallel_vae": True},
    "cfg2": {"use_cfg_parallel": True},
    "dp2": {"data_parallel_degree": 2},  # only for classes that sequence parallelism refuses
    "pipefusion2": {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 2},
}
DEFAULT = {
    "ulysses2": {
        "wan_two", "wan_vace", "cogvideox", "hunyuan_video_15", "ltx2", "qwen_image", "flux2", "sana", "lumina2",
        "latte", "skyreels_v2_forcing", "bria_fibo", "kandinsky6",
    },
    "cfg2": {
        "wan", "hunyuan_video", "ltx_i2v", "ltx2", "flux_kontext", "z_image", "krea2", "skyreels_v2_forcing",
        "ideogram4",
    },
    "dp2": set(),
    "pipefusion2": {
        "wan", "wan_i2v", "hunyuan_video", "ltx", "qwen_image", "flux_fill", "cogview4", "aura_flow",
        "longcat_image_edit",
    },
}  # fmt: skip
REFUSED = {  # refused by PipeFusion, although it supports the transformer's class
    "skyreels_v2_forcing": "copy their scheduler",
    "hunyuan_image_guided": "does not support AdaptiveProjectedMixGuidance of HunyuanImagePipeline",
    "sana_sprint": "leave out its last timestep",
    "cosmos": "turn their scheduler back",
}


@pytest.fixture(scope="session")
def path_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("whole")
    return lambda name: whole.save(name, root)


def degrees_of(name, method):
    degrees = dict(METHODS[method])
    if method == "pipefusion2":  # all steps synchronous, so equal to serial
        degrees["warmup_steps"] = whole.call_of(name)["num_inference_steps"]
    if "use_parallel_vae" in degrees:
        degrees["use_parallel_vae"] = type(WHOLE[name].vae()).__name__ in PROVEN
    return degrees


def plan(name):
    return PLANS[FAMILIES[WHOLE[name].family].cls]


def refusal(name):
    return REFUSED.get(name) or plan(name).unpiped


def serves(method, name):
    if method == "pipefusion2":
        return refusal(name) is None
    return plan(name).unsequenced is None if method == "ulysses2" else method != "dp2" or plan(name).unsequenced


def marked(name, method):
    return pytest.param(name, method, marks=[] if name in DEFAULT[method] else [pytest.mark.matrix])


RUN = [marked(name, method) for method in METHODS for name in WHOLE if serves(method, name)]


@pytest.mark.parametrize(("name", "method"), RUN)
def test_pipeline_equals_serial(pool, path_of, name, method):
    expected = whole.drawn(path_of(name), name)
    for results in pool.run(2, whole.draw, path_of(name), name, degrees_of(name, method)):
        for result, reference in zip(results, expected, strict=True):
            assert running.error(result, reference) <= WHOLE[name].tolerance


ONE_FRAME = {"num_frames": 1}
TWO, MASK = torch.stack([whole.rows(7), -whole.rows(7)]), torch.arange(7) < torch.tensor([[3], [7]])
DISPLACED = {  # pipelines under PipeFusion with asynchronous steps: changes of the call
    "cosmos2": {},
    "wan": ONE_FRAME,
    "wan_vace": {},
    "ltx_i2v": {"num_frames": 41},
    "wan_animate": {},
    "ltx_condition": {"frame_index": 0},
    "kandinsky5": ONE_FRAME,
    "sana": {},
    "ltx2": {"guidance_rescale": 0.0, "audio_guidance_rescale": 0.0},
    "mochi": {"output_type": "latent", "prompt": ["a red circle", "a"], "negative_prompt": ["the cat", ""]},
    "z_image": {"prompt_embeds": [whole.rows(33), whole.rows(6)], "negative_prompt_embeds": [whole.rows(5)] * 2},
    "lumina2": {
        "prompt_embeds": TWO,
        "prompt_attention_mask": MASK,
        "negative_prompt_embeds": TWO.flip(1),
        "negative_prompt_attention_mask": MASK.flip(0),
    },
}


def drawn_under(path, name, changes, asked):
    return [whole.draw(path, name, degrees, **changes) for degrees in asked]


@pytest.mark.parametrize("name", DISPLACED)
def test_displaced_patches_equal_the_oracle(pool, path_of, name):
    changes = {"num_inference_steps": 4} | DISPLACED[name]
    path, of_two = path_of(name), {"pipefusion_parallel_degree": 2, "warmup_steps": 1}
    expected = {patches: whole.displaced(path, name, patches, **changes) for patches in (2, 3)}
    serial = whole.draw(path, name, None, **changes)
    for ranks, others in ((2, {}), (4, {"ulysses_degree": 2})):
        asked = [of_two | others | {"num_pipeline_patch": patches} for patches in expected]
        for results in pool.run(ranks, drawn_under, path, name, changes, asked):
            for drawn, references in zip(results, expected.values(), strict=True):
                for result, reference, exact in zip(drawn, references, serial, strict=True):
                    assert running.error(result, reference) <= WHOLE[name].tolerance
                    assert running.error(reference, exact) > 10 * WHOLE[name].tolerance  # staleness has an effect


def refused(path, name, degrees, changes):
    with pytest.raises(ValueError) as error:
        whole.draw(path, name, degrees, **changes)
    whole.loaded.cache_clear()  # its blocks are split over stages
    return str(error.value)


@pytest.mark.parametrize("name", [name for name in WHOLE if refusal(name)])
def test_pipefusion_refuses_by_name(pool, path_of, name):
    for message in pool.run(2, refused, path_of(name), name, degrees_of(name, "pipefusion2"), {}):
        assert refusal(name) in message


def test_a_video_that_is_only_its_given_frame_has_no_patches(pool, path_of):
    degrees = degrees_of("ltx_i2v", "pipefusion2")
    for message in pool.run(2, refused, path_of("ltx_i2v"), "ltx_i2v", degrees, {"num_frames": 1}):
        assert "more than the 0 frames" in message and "use Ulysses, ring, CFG or data parallelism" in message


def test_guidance_with_calls_of_other_shapes(pool, path_of):
    """The last window of a long video is shorter than the first one, which showed that calls come in pairs."""
    changes = {"num_frames": 17, "base_num_frames": 13, "overlap_history": 5, "ar_step": 0}
    path = path_of("skyreels_v2_forcing")
    expected = whole.draw(path, "skyreels_v2_forcing", None, **changes)
    for results in pool.run(2, drawn_with, path, "skyreels_v2_forcing", METHODS["cfg2"], changes):
        assert running.error(results[0], expected[0]) <= running.TOLERANCE


def drawn_with(path, name, degrees, changes):
    return whole.draw(path, name, degrees, **changes)
