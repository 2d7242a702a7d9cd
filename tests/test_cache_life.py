"""Caches over several calls of a pipeline and together with other features, and the caches that are refused."""

import diffusers
import numpy as np
import pytest
import running
import tiny
import torch
import whole
from accelerate import cpu_offload
from diffusers import DiffusionPipeline
from diffusers.hooks import apply_pyramid_attention_broadcast
from test_changed import adapter

from xfuser import xFuserArgs
from xfuser.core.meters import traffic

THRESHOLD = 0.33
FIRST_BLOCK = diffusers.FirstBlockCacheConfig(threshold=THRESHOLD)
MAG = diffusers.MagCacheConfig(threshold=0.3, mag_ratios=[1.0, 1.1, 0.9, 1.0, 1.0, 0.9], num_inference_steps=6)
CALL = tiny.call_of("flux", num_inference_steps=6, output_type="latent")


def fresh(path):
    pipe = DiffusionPipeline.from_pretrained(path)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def drawn(pipe, **changes):
    return running.array(pipe(**CALL | changes, generator=running.seeded()))


def stop(pipe, step, timestep, values):
    if step == 3:
        raise KeyboardInterrupt
    return values


def calls(path, degrees, config):
    """Run a call, the same call again, one with fewer steps, one that is aborted, and the first one again."""
    pipe = fresh(path)
    pipe.transformer.enable_cache(config)
    wrapped = running.wrap(pipe, degrees)
    pictures = [drawn(wrapped), drawn(wrapped), drawn(wrapped, num_inference_steps=4)]
    with pytest.raises(KeyboardInterrupt):
        drawn(wrapped, callback_on_step_end=stop)
    if degrees is None:
        pipe.transformer._reset_stateful_cache()
    return [*pictures, drawn(wrapped)]


@pytest.mark.parametrize("config", [FIRST_BLOCK, MAG])
def test_every_call_begins_anew(pool, folder_of, config):
    expected = calls(folder_of("flux"), None, config)
    assert np.array_equal(expected[0], expected[1]) and np.array_equal(expected[0], expected[3])
    for pictures in pool.run(2, calls, folder_of("flux"), {"ulysses_degree": 2}, config):
        for picture, one in zip(pictures, expected, strict=True):
            assert running.error(picture, one) <= running.TOLERANCE


def beside(path, degrees, what):
    """Return an image of a cached pipeline that is compiled, offloaded, or has an adapter, and the skipped fraction."""
    torch._dynamo.reset()
    pipe = fresh(path)
    pipe.transformer.enable_cache(diffusers.FirstBlockCacheConfig(0.9) if what == "lora" else FIRST_BLOCK)
    wrapped = running.wrap(pipe, degrees)
    if what == "lora":
        wrapped.load_lora_weights(adapter(pipe))
    elif what == "offload":
        cpu_offload(pipe.transformer, torch.device("cpu"))
    elif what == "compiled" and degrees:
        pipe.transformer = torch.compile(pipe.transformer, backend="eager")
    return drawn(wrapped), wrapped.cache_use.skipped if degrees else 0


@pytest.mark.parametrize("what", ["lora", "offload", "compiled"])
def test_beside_what_else_is_done(pool, folder_of, what):
    expected, _ = beside(folder_of("flux"), None, what)
    for picture, skipped in pool.run(2, beside, folder_of("flux"), {"ulysses_degree": 2}, what):
        assert running.error(picture, expected) <= running.TOLERANCE and skipped


def by_flags(path, flags):
    """Return an image with these flags, and whether unwrap() restores the pipeline."""
    pipe = fresh(path)
    wrapped = running.wrap(pipe, flags)
    picture = drawn(wrapped)
    left = [one for one in pipe.transformer.modules() if getattr(vars(one).get("_diffusers_hook"), "hooks", None)]
    wrapped.unwrap()
    return picture, len(left)


def enabled(path, degrees):
    """Return images of a pipeline with a cache enabled before the wrap: wrapped, and after unwrap()."""
    pipe = fresh(path)
    pipe.transformer.enable_cache(FIRST_BLOCK)
    wrapped = running.wrap(pipe, degrees)
    pictures = [drawn(wrapped)]
    running.unwrap(wrapped)
    return [*pictures, drawn(pipe)]


def test_flags_are_the_caches_of_diffusers(pool, folder_of):
    flags = {"use_fbcache": True, "rel_l1_thresh": THRESHOLD, "ulysses_degree": 2}
    (expected, serial) = enabled(folder_of("flux"), None)
    assert np.array_equal(expected, serial)
    for picture, left in pool.run(2, by_flags, folder_of("flux"), flags):
        assert running.error(picture, expected) <= running.TOLERANCE and left == 0
    piped = {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 2}
    flags = {"use_fbcache": True, "cache_threshold": THRESHOLD} | piped
    by_flag = pool.run(2, by_flags, folder_of("flux"), flags)[0][0]
    for picture, bare in pool.run(2, enabled, folder_of("flux"), piped):
        assert np.array_equal(picture, by_flag) and running.error(bare, expected) <= running.TOLERANCE


def agreed(path):
    """Return the bytes that a call's forwards send in reductions, which are those of their decisions."""
    pipe = fresh(path)
    pipe.transformer.enable_cache(FIRST_BLOCK)
    wrapped = running.wrap(pipe, {"ulysses_degree": 2})
    with traffic() as meter:
        drawn(wrapped)
    return meter.sent["all_reduce"]


def test_agreement_is_32_bytes_a_forward_behind_the_first(pool, folder_of):
    assert pool.run(2, agreed, folder_of("flux")) == [32 * (CALL["num_inference_steps"] - 1)] * 2


REFUSED = {
    "use_fbcache and use_teacache are two ways": {"use_fbcache": True, "use_teacache": True},
    "cache_threshold=0.1 requires use_fbcache or use_teacache": {"cache_threshold": 0.1},
    "cache_threshold=-1 must be a number of 0 or more": {"cache_threshold": -1, "use_fbcache": True},
    "cache_threshold=0.1 and rel_l1_thresh=0.2": {"cache_threshold": 0.1, "rel_l1_thresh": 0.2, "use_fbcache": True},
    "no coefficients are known for this PixArtTransformer2DModel": {"use_teacache": True, "model": "shapes-256"},
}


@pytest.mark.parametrize("told", REFUSED)
def test_flags_that_are_refused(told):
    with pytest.raises(ValueError, match=told):
        xFuserArgs(**REFUSED[told]).checked(1)


def refused(path, degrees, change, **changes):
    pipe = fresh(path)
    with pytest.raises(ValueError) as told:
        change(pipe)
        drawn(running.wrap(pipe, degrees), **changes)
    return str(told.value)


def pyramid(pipe):
    config = diffusers.PyramidAttentionBroadcastConfig(current_timestep_callback=lambda: 500)
    apply_pyramid_attention_broadcast(pipe.transformer, config)


def faster(pipe):
    config = diffusers.FasterCacheConfig(current_timestep_callback=lambda: 500, tensor_format="BCHW")
    pipe.transformer.enable_cache(config)


def calibrated(pipe):
    pipe.transformer.enable_cache(diffusers.MagCacheConfig(calibrate=True))


def text(pipe):
    pipe.transformer.enable_cache(diffusers.hooks.TextKVCacheConfig())


def test_caches_that_are_refused(pool, folder_of):
    piped = {"pipefusion_parallel_degree": 2}
    for degrees, change, expected in (
        (piped, pyramid, "PyramidAttentionBroadcastHook of FluxTransformer2DModel keeps what"),
        ({"data_parallel_degree": 2}, faster, "halves the batch of guidance"),
        ({"ulysses_degree": 2}, calibrated, "measures each rank's own tokens"),
        ({"ulysses_degree": 2}, text, "keeps a state between steps, of which nothing is known here"),
    ):
        for told in pool.run(2, refused, folder_of("flux"), degrees, change):
            assert expected in told


def twice(path):
    guided = {"true_cfg_scale": 2.0, "negative_prompt": "a cat"}
    return refused(path, {"use_cfg_parallel": True}, pyramid, **guided)


def test_one_state_for_both_calls_of_a_step_is_refused(pool, folder_of):
    for told in pool.run(2, twice, folder_of("flux")):
        assert "keeps one state for all calls of a step, which CFG parallelism divides over ranks" in told


SEA = diffusers.SeaCacheConfig(threshold=0.6)


def cached_whole(path, name, degrees, config, images):
    """Return a video of a pipeline that gives its caches a context, and the number of blocks that ran."""
    pipe, ran = whole.loaded(path, name), []
    models = [model for key, model in pipe.components.items() if key.startswith("transformer") and model is not None]
    hooks = [
        block.attn1.register_forward_pre_hook(lambda *_: ran.append(1)) for model in models for block in model.blocks
    ]
    for model in models:
        model.enable_cache(config)
    wrapped = running.wrap(pipe, degrees)
    try:
        call = whole.call_of(name, num_inference_steps=6, num_videos_per_prompt=images, output_type="latent")
        return running.array(wrapped(**call, generator=running.seeded())), len(ran)
    finally:
        running.unwrap(wrapped)
        for model in models:
            model.disable_cache()
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize(
    ("name", "config", "degrees", "images"),
    [
        ("wan", SEA, {"ulysses_degree": 2}, 1),
        ("wan", SEA, {"data_parallel_degree": 2}, 3),
        ("wan", SEA, {"use_cfg_parallel": True}, 1),
        ("wan_two", diffusers.FirstBlockCacheConfig(threshold=0.5), {"ring_degree": 2}, 1),
    ],
)
def test_pipelines_that_give_contexts(pool, tmp_path_factory, name, config, degrees, images):
    path = whole.save(name, tmp_path_factory.mktemp("cached"))
    expected, ran = cached_whole(path, name, None, config, images)
    all_blocks = cached_whole(path, name, None, diffusers.FirstBlockCacheConfig(threshold=0.0), images)[1]
    assert ran < all_blocks
    for picture, own in pool.run(2, cached_whole, path, name, degrees, config, images):
        assert running.error(picture, expected) <= running.TOLERANCE
        assert own == ran or "use_cfg_parallel" in degrees
