"""Different inputs that pipelines pass to the same class: each equals serial on shards of the tokens."""

import copy
import sys
from dataclasses import replace

import diffusers
import pytest
import torch
from diffusers.guiders import AdaptiveProjectedMixGuidance

from xfuser import xDiTParallel, xFuserArgs
from xfuser.core.hooks import replaced
from xfuser.models import registry
from xfuser.testing import matrix, oracle
from xfuser.testing.loop import DenoisingLoop
from xfuser.testing.zoo import FAMILIES, TEXT, WIDTH, WORDS

USP = {"ulysses2": {"ulysses_degree": 2}, "ring2": {"ring_degree": 2}}


def with_conditions(family, more, **config):
    """Return a family with more arguments, ``more(rows, draw)``, and changes of its configuration."""
    known = FAMILIES[family]
    return replace(
        known,
        config=known.config | config,
        conditions=lambda model, rows, draw: known.conditions(model, rows, draw) | more(rows, draw),
    )


def timed(family, timestep, **changes):
    return replace(FAMILIES[family], timestep=timestep, **changes)


def per_token(count):
    """Return a timestep for each token; it is 0 for the first ones, as in image-to-video, where they are the image."""
    return lambda t: t[:, None] * torch.cat([torch.zeros(7), torch.ones(count - 7)])


def with_pictures(rows, draw):
    """Return inputs in which every other batch entry has an image within its text."""
    count = 20 + 1 + 15
    return {
        "input_ids": torch.arange(20).expand(rows, -1),
        "input_img_latents": [draw(1, 4, 4, 6) for _ in range(rows // 2)],
        "input_image_sizes": {row: [[5, 11]] for row in range(1, rows, 2)},
        "attention_mask": torch.ones(rows, count, count),
        "position_ids": torch.arange(count).expand(rows, -1),
    }


def as_much_text(family, **more):
    """Return a family with as many text tokens as image tokens, evenly split."""

    def text(rows, draw):
        one = {name: value(rows) for name, value in more.items()}
        return {"encoder_hidden_states": draw(rows, 14, TEXT)} | one

    return replace(with_conditions(family, text), latents=(14, 8))


def frame_by_frame(frames):
    """Return a mask under which no token attends to later frames."""
    frame = torch.arange(frames * 15) // 15
    return (frame[:, None] >= frame).float()


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
    "ltx2, perturbed attention": with_conditions(
        "ltx2", lambda rows, draw: {"spatio_temporal_guidance_blocks": [1]}, perturbed_attn=True
    ),
    "ltx2, a mask over pairs of tokens": with_conditions(
        "ltx2", lambda rows, draw: {"video_self_attention_mask": frame_by_frame(3).expand(rows, -1, -1)}
    ),
    "ltx2, one token of sound": with_conditions(
        "ltx2", lambda rows, draw: {"audio_hidden_states": draw(rows, 1, 8), "audio_num_frames": 1}
    ),
    "sana, with a ControlNet": with_conditions(
        "sana", lambda rows, draw: {"controlnet_block_samples": tuple(draw(rows, 15, WIDTH) for _ in range(2))}
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
    "cosmos, with a ControlNet": with_conditions(
        "cosmos", lambda rows, draw: {"block_controlnet_hidden_states": [draw(rows, 45, 36) for _ in range(3)]},
        controlnet_block_every_n=1,
    ),
    "hidream, a square": replace(FAMILIES["hidream"], latents=(4, 6, 6)),
}  # fmt: skip


# Arguments that are not split with the rows of a batch of two, or that are split in another way.
ROWS = {
    "omnigen, pictures": with_conditions("omnigen", with_pictures),
    "wan_vace, two blocks of control": FAMILIES["wan_vace"],
}
EVEN = {
    "flux": as_much_text(
        "flux",
        img_ids=lambda rows: torch.cartesian_prod(torch.arange(1), torch.arange(7), torch.arange(2)).float(),
        txt_ids=lambda rows: torch.zeros(14, 3),
    ),
    "qwen_image": as_much_text(
        "qwen_image",
        img_shapes=lambda rows: [[(1, 7, 2)]] * rows,
        encoder_hidden_states_mask=lambda rows: torch.ones(rows, 14, dtype=torch.bool),
    ),
}


def draw(variant, degrees, **call):
    return matrix.draw_family((VARIANTS | ROWS | EVEN)[variant], degrees, call)


@pytest.mark.parametrize("method", USP)
@pytest.mark.parametrize("variant", VARIANTS)
def test_variants(pool, variant, method):
    expected = draw(variant, None)
    for result in pool.run(2, draw, variant, USP[method]):
        assert matrix.error(result, expected) <= matrix.TOLERANCE


@pytest.mark.parametrize("variant", ROWS)
def test_rows_take_along_what_is_theirs(pool, variant):
    for degrees, images in (({"use_cfg_parallel": True}, 1), ({"data_parallel_degree": 2}, 3)):
        expected = draw(variant, None, images=images)
        for result in pool.run(2, draw_images, variant, degrees, images):
            assert matrix.error(result, expected) <= matrix.TOLERANCE


def draw_images(variant, degrees, images):
    return draw(variant, degrees, images=images)


def one_text_token(family):
    """Within the context, the family's inputs have only one text token."""
    return replaced(sys.modules[FAMILIES[family].conditions.__module__], "WORDS", 1)


def one_word(family, degrees):
    with one_text_token(family):
        return matrix.draw(family, degrees, {})


@pytest.mark.parametrize("family", ["flux", "hunyuan_video", "qwen_image", "sd3"])
def test_less_text_than_ranks(pool, family):
    expected = one_word(family, None)
    piped = {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 2, "warmup_steps": 3, "ulysses_degree": 2}
    for ranks, degrees in ((2, USP["ring2"]), (4, {"ulysses_degree": 4}), (4, piped)):
        for result in pool.run(ranks, one_word, family, degrees):
            assert matrix.error(result, expected) <= matrix.TOLERANCE


def one_word_in_patches(family, degrees):
    with one_text_token(family):
        return matrix.error(matrix.draw(family, degrees, {}), matrix.reference(family, degrees, {}))


@pytest.mark.parametrize(
    "family", ["chroma", "cogvideox", "cogview3", "cogview4", "flux2", "hunyuan_video", "krea2", "sd3"]
)
def test_one_text_token_under_pipefusion(pool, family):
    """It runs only with patch 0; an argument with one entry for it is not the same for all tokens."""
    for ranks, degrees in ((2, {"num_pipeline_patch": 3}), (4, {"num_pipeline_patch": 2, "ulysses_degree": 2})):
        assert max(pool.run(ranks, one_word_in_patches, family, matrix.PIPED | degrees)) <= matrix.TOLERANCE


def unplanned(family, degrees, variants=FAMILIES):
    """Run the family's loop as if there were no plan for its class."""
    plan = registry.PLANS.pop(FAMILIES[family].cls)
    try:
        return matrix.draw_family(variants[family], degrees, {})
    finally:
        registry.PLANS[FAMILIES[family].cls] = plan


def unplanned_even(family, degrees):
    return unplanned(family, degrees, EVEN)


@pytest.mark.parametrize("family", EVEN)
def test_classes_without_a_plan_with_as_much_text_as_image(pool, family):
    expected = draw(family, None)
    for result in pool.run(2, unplanned_even, family, USP["ulysses2"]):
        assert matrix.error(result, expected) <= matrix.TOLERANCE


@pytest.mark.parametrize("family", ["flux", "flux2", "ltx", "qwen_image", "wan"])
def test_classes_without_a_plan_go_by_that_of_diffusers(pool, family):
    expected = matrix.draw(family, None, {})
    both = {"ulysses_degree": 2, "ring_degree": 2}
    for ranks, degrees in ((4, both), (2, {"use_cfg_parallel": True}), (4, {"data_parallel_degree": 2} | USP["ring2"])):
        for result in pool.run(ranks, unplanned, family, degrees):
            assert matrix.error(result, expected) <= matrix.TOLERANCE


def unplanned_in_patches():
    with pytest.raises(ValueError, match="PipeFusion does not support WanTransformer3DModel: there is no plan for it"):
        unplanned("wan", {"pipefusion_parallel_degree": 1, "num_pipeline_patch": 2})


def test_pipefusion_of_a_class_without_a_plan_is_refused(pool):
    pool.run(1, unplanned_in_patches)


class WithSound(DenoisingLoop):
    """Steps video and sound, each with its own scheduler."""

    @torch.no_grad()
    def __call__(self, family):
        generator = torch.Generator().manual_seed(0)

        def noise(*shape):
            return torch.randn(*shape, generator=generator)

        conditions = family.conditions(self.transformer, 2, noise)
        latents, sound = noise(1, *family.latents), conditions.pop("audio_hidden_states")[:1]
        scheduler = copy.deepcopy(self.scheduler)
        scheduler.set_timesteps(3)
        self.scheduler.set_timesteps(3)
        for t in self.scheduler.timesteps:
            both = latents.expand(2, -1, -1), sound.expand(2, -1, -1)
            outputs = self.transformer(*both, timestep=t.expand(2), **conditions, return_dict=False)
            video, audio = (x[:1] + 3 * (x[1:] - x[:1]) for x in outputs)
            latents = self.scheduler.step(video, t, latents, return_dict=False)[0]
            sound = scheduler.step(audio, t, sound, return_dict=False)[0]
        return [latents, sound]


def with_sound(degrees):
    pipe = WithSound(FAMILIES["ltx2"].build(), diffusers.FlowMatchEulerDiscreteScheduler())
    return called(pipe, degrees, {"family": FAMILIES["ltx2"]})


def test_a_copied_scheduler_steps_by_itself(pool):
    expected = with_sound(None)
    for result in pool.run(2, with_sound, {"use_cfg_parallel": True}):
        assert matrix.error(result, expected) <= matrix.TOLERANCE


def called(pipe, degrees, call):
    """Return a call's result: wrapped with these degrees, unwrapped for None, of the oracle for a tuple."""
    pipe.set_progress_bar_config(disable=True)
    if degrees is None:
        return pipe(**call)
    if isinstance(degrees, tuple):
        with oracle.displaced(pipe, *degrees):
            return pipe(**call)
    parallel = xDiTParallel(pipe, *xFuserArgs(**degrees).create_config())
    result = parallel(**call)
    parallel.unwrap()
    return result


def wan_pipeline():
    scheduler = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True)
    transformer = FAMILIES["wan"].build()
    return diffusers.WanPipeline(
        tokenizer=None, text_encoder=None, vae=None, transformer=transformer, scheduler=scheduler
    ), (4, 3, 10, 6)


def cogvideox_pipeline():
    known = FAMILIES["cogvideox"]
    return diffusers.CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=replace(known, config=known.config | {"attention_head_dim": 16}).build(),
        scheduler=diffusers.CogVideoXDPMScheduler(),
    ), (3, 4, 10, 6)


PIPELINES = {"sigmas by number": wan_pipeline, "results of the step before": cogvideox_pipeline}


def looks_back(name, degrees):
    """Run video pipelines that look up values of the current or the previous step."""
    pipe, latents = PIPELINES[name]()
    generator = torch.Generator().manual_seed(0)
    text, without = (torch.randn(1, WORDS, TEXT, generator=generator) for _ in range(2))
    start = torch.randn(1, *latents, generator=generator)
    call = {
        "prompt_embeds": text, "negative_prompt_embeds": without, "latents": start,
        "height": 80, "width": 48, "num_frames": 9, "num_inference_steps": 4, "generator": generator,
        "output_type": "latent", "return_dict": False,
    }  # fmt: skip
    return [called(pipe, degrees, call)[0]]


@pytest.mark.parametrize("name", PIPELINES)
def test_pipefusion_of_pipelines_that_look_back(pool, name):
    for patches in (2, 3):
        expected = looks_back(name, (patches, 1))
        degrees = {"pipefusion_parallel_degree": 2, "num_pipeline_patch": patches, "warmup_steps": 1}
        for result in pool.run(2, looks_back, name, degrees):
            assert matrix.error(result, expected) <= matrix.TOLERANCE


def not_of_a_patch():
    patches = {"pipefusion_parallel_degree": 1, "num_pipeline_patch": 2}
    parts = dict.fromkeys(("vae", "text_encoder", "tokenizer", "text_encoder_2", "tokenizer_2"))
    pipe = diffusers.HunyuanImagePipeline(
        transformer=FAMILIES["hunyuan_image"].build(),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
        guider=AdaptiveProjectedMixGuidance(),
        **parts,
    )
    with pytest.raises(ValueError, match="does not support AdaptiveProjectedMixGuidance of HunyuanImagePipeline"):
        called(pipe, patches, {"prompt": "a"})
    copying = WithSound(FAMILIES["cogvideox"].build(), diffusers.FlowMatchEulerDiscreteScheduler())
    with pytest.raises(ValueError, match="PipeFusion does not support pipelines that copy their scheduler"):
        called(copying, patches, {"family": FAMILIES["ltx2"]})
    next_time = with_conditions(
        "hunyuan_image", lambda rows, draw: {"timestep_r": torch.full((rows,), 100.0)}, use_meanflow=True
    )
    with pytest.raises(ValueError, match="PipeFusion does not support 'timestep_r'"):
        matrix.draw_family(next_time, patches, {})


def test_pipefusion_refuses_what_is_not_of_a_patch(pool):
    pool.run(1, not_of_a_patch)


def cached_pictures(degrees):
    known = with_conditions("flux2", lambda rows, draw: {"kv_cache_mode": "extract", "num_ref_tokens": 6})
    with pytest.raises(ValueError, match="do not support kv_cache_mode='extract' of Flux2Transformer2DModel"):
        matrix.draw_family(known, degrees, {})


def test_picking_tokens_by_their_number_is_refused(pool):
    pool.run(2, cached_pictures, USP["ring2"])
