"""What pipelines pass to a class in more than one way: each way equals serial on shares of the tokens."""

from dataclasses import replace

import pytest
import torch

from xfuser.models import registry
from xfuser.testing import matrix, zoo
from xfuser.testing.zoo import FAMILIES, WIDTH

USP = {"ulysses2": {"ulysses_degree": 2}, "ring2": {"ring_degree": 2}}


def with_conditions(family, more, **config):
    """A family with more arguments: ``more(rows, draw)``, and changes of its configuration."""
    known = FAMILIES[family]
    return replace(
        known,
        config=known.config | config,
        conditions=lambda model, rows, draw: known.conditions(model, rows, draw) | more(rows, draw),
    )


def timed(family, timestep, **changes):
    return replace(FAMILIES[family], timestep=timestep, **changes)


def per_token(count):
    """A time for each token, and none for the first ones, as where these are a picture to go on from."""
    return lambda t: t[:, None] * torch.cat([torch.zeros(7), torch.ones(count - 7)])


VARIANTS = {
    "wan, a time for each token": timed("wan", per_token(45)),
    "wan, a picture to begin with": with_conditions(
        "wan", lambda rows, draw: {"encoder_hidden_states_image": draw(rows, 5, 10)},
        image_dim=10, added_kv_proj_dim=WIDTH,
    ),
    "skyreels, a time for each frame": replace(
        with_conditions("skyreels_v2", lambda rows, draw: {"enable_diffusion_forcing": True}, num_frame_per_block=1),
        timestep=lambda t: t[:, None] * torch.tensor([0.0, 0.5, 1.0, 1.0]),
    ),
    "ltx, a time for each token": timed("ltx", per_token(45)),
    "ltx2, a time for each token": replace(
        with_conditions("ltx2", lambda rows, draw: {"audio_timestep": torch.full((rows, 1), 500.0)}),
        timestep=per_token(45),
    ),
    "cosmos, a time for each frame": timed(
        "cosmos", lambda t: (t[:, None] * torch.tensor([0.0, 1.0, 1.0]))[:, None, :, None, None]
    ),
    "hunyuan_video, from text": with_conditions("hunyuan_video", lambda rows, draw: {}, image_condition_type=None),
    "qwen_image, with a picture to edit": with_conditions(
        "qwen_image", lambda rows, draw: {"img_shapes": [[(1, 3, 3), (1, 2, 3)]] * rows}, zero_cond_t=True
    ),
    "qwen_image, with a ControlNet": with_conditions(
        "qwen_image", lambda rows, draw: {"controlnet_block_samples": [draw(rows, 15, WIDTH) for _ in range(3)]}
    ),
    "z_image, with a ControlNet": with_conditions(
        "z_image", lambda rows, draw: {"controlnet_block_samples": {1: draw(rows, 64, WIDTH)}}
    ),
    "sana, with a ControlNet": with_conditions(
        "sana", lambda rows, draw: {"controlnet_block_samples": [draw(rows, 15, WIDTH) for _ in range(2)]}
    ),
    "cosmos, with a ControlNet": with_conditions(
        "cosmos", lambda rows, draw: {"block_controlnet_hidden_states": [draw(rows, 45, 36) for _ in range(3)]},
        controlnet_block_every_n=1,
    ),
    "hidream, a square": replace(FAMILIES["hidream"], latents=(4, 6, 6)),
}  # fmt: skip


def draw(variant, degrees, **call):
    return matrix.draw_family(VARIANTS[variant], degrees, call)


@pytest.mark.parametrize("method", USP)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(pool, variant, method):
    expected = draw(variant, None)
    for result in pool.run(2, draw, variant, USP[method]):
        assert matrix.error(result, expected) <= matrix.TOLERANCE


def one_word(family, degrees):
    words, zoo.WORDS = zoo.WORDS, 1
    try:
        return matrix.draw(family, degrees, {})
    finally:
        zoo.WORDS = words


@pytest.mark.parametrize("family", ["flux", "hunyuan_video", "qwen_image", "sd3"])
def test_less_text_than_ranks(pool, family):
    expected = one_word(family, None)
    piped = {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 2, "warmup_steps": 3, "ulysses_degree": 2}
    for ranks, degrees in ((2, USP["ring2"]), (4, {"ulysses_degree": 4}), (4, piped)):
        for result in pool.run(ranks, one_word, family, degrees):
            assert matrix.error(result, expected) <= matrix.TOLERANCE


def unplanned(family, degrees):
    """The family's loop, were there no plan for its class."""
    plan = registry.PLANS.pop(FAMILIES[family].cls)
    try:
        return matrix.draw(family, degrees, {})
    finally:
        registry.PLANS[FAMILIES[family].cls] = plan


@pytest.mark.parametrize("family", ["flux", "flux2", "ltx", "qwen_image", "wan"])
def test_classes_without_a_plan_go_by_that_of_diffusers(pool, family):
    expected = matrix.draw(family, None, {})
    both = {"ulysses_degree": 2, "ring_degree": 2}
    for ranks, degrees in ((4, both), (2, {"use_cfg_parallel": True}), (4, {"data_parallel_degree": 2} | USP["ring2"])):
        for result in pool.run(ranks, unplanned, family, degrees):
            assert matrix.error(result, expected) <= matrix.TOLERANCE


def test_pipefusion_of_a_class_without_a_plan_is_refused(monkeypatch):
    monkeypatch.delitem(registry.PLANS, "WanTransformer3DModel")
    with pytest.raises(ValueError, match="PipeFusion does not serve WanTransformer3DModel: there is no plan for it"):
        matrix.draw("wan", {"pipefusion_parallel_degree": 1, "num_pipeline_patch": 2}, {})
