"""Perturbed-attention guidance (PAG): three branches in a batch, or two, on any number of ranks."""

import inspect
from functools import cache

import diffusers
import more_unets
import pytest
import running
import tiny
import unets
import whole

CFG, DP = {"use_cfg_parallel": True}, {"data_parallel_degree": 2}
UNGUIDED = {"guidance_scale": 0.0}


def sd(images):
    return unets.call_of(images, height=72, width=56)


def animated(images):
    return more_unets.CALL | more_unets.prompts(images) | {"num_frames": 3}


CLASSES = {  # class, perturbed layers, and arguments of the call
    "pixart_sigma": ("PixArtSigmaPAGPipeline", ["blocks.1"], lambda images: tiny.call_of("pixart_sigma", images)),
    "sd3": ("StableDiffusion3PAGPipeline", ["blocks.1"], lambda images: tiny.call_of("sd3", images)),
    "hunyuan_dit": ("HunyuanDiTPAGPipeline", ["blocks.1"], lambda images: tiny.call_of("hunyuan_dit", images)),
    "sana": ("SanaPAGPipeline", ["blocks.1"], lambda images: whole.call_of("sana", num_images_per_prompt=images)),
    "sdxl": ("StableDiffusionXLPAGPipeline", ["mid", "up_blocks.0"], sd),
    "sd15": ("StableDiffusionPAGPipeline", ["mid"], sd),
    "animatediff": ("AnimateDiffPAGPipeline", ["mid_block.attentions"], animated),
}


@cache
def loaded(path, name):
    cls, layers, _ = CLASSES[name]
    base = {
        "sana": lambda: whole.loaded(path, name), "animatediff": lambda: more_unets.built(name),
    }.get(name, lambda: running.loaded(path))()  # fmt: skip
    more = {"requires_safety_checker": False} if name in ("sd15", "hunyuan_dit") else {}
    given = inspect.signature(getattr(diffusers, cls)).parameters
    parts = {name: part for name, part in base.components.items() if name in given}
    pipe = getattr(diffusers, cls)(**parts, pag_applied_layers=layers, **more)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(path, name, degrees, images, changes):
    pipe = running.wrap(loaded(path, name), degrees)
    call = CLASSES[name][2](images) | {"pag_scale": 3.0} | changes
    result = running.array(pipe(**call, generator=running.seeded()))
    running.unwrap(pipe)
    return result


@pytest.fixture(scope="session")
def path_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("perturbed")

    def path(name):
        if name in unets.PIPELINES:
            return unets.save(name, root)
        return None if name == "animatediff" else whole.save(name, root) if name == "sana" else tiny.save(name, root)

    return path


@pytest.mark.parametrize(
    ("name", "ranks", "degrees", "images", "changes"),
    [
        ("sdxl", 4, CFG | DP, 3, {}),
        ("pixart_sigma", 2, CFG, 1, {}),
        ("pixart_sigma", 2, DP, 3, {}),
        ("pixart_sigma", 2, {"ulysses_degree": 2}, 2, {}),
        ("pixart_sigma", 4, CFG | {"ring_degree": 2}, 2, {}),
        ("pixart_sigma", 2, CFG, 2, UNGUIDED),
        ("pixart_sigma", 2, DP, 2, UNGUIDED),
        ("sd3", 4, CFG | DP, 3, {}),
        ("hunyuan_dit", 2, CFG, 1, {}),
        ("hunyuan_dit", 2, DP, 2, {}),
        ("sana", 4, CFG | DP, 2, {}),
        ("sdxl", 2, CFG, 1, UNGUIDED),
        ("sdxl", 4, CFG | {"distrifusion_degree": 2, "distrifusion_mode": "full_sync"}, 1, {}),
        ("sd15", 2, CFG, 1, {"pag_adaptive_scale": 0.002}),
        ("animatediff", 4, CFG | DP, 3, {}),
    ],
)
def test_equals_serial(pool, path_of, name, ranks, degrees, images, changes):
    path = path_of(name)
    expected = draw(path, name, None, images, changes)
    for result in pool.run(ranks, draw, path, name, degrees, images, changes):
        assert running.error(result, expected) <= running.TOLERANCE
    assert running.error(expected, draw(path, name, None, images, changes | {"pag_scale": 0.0})) > 1e-3
