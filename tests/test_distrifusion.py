"""DistriFusion and naive patches of transformers equal their definitions, on any number of ranks."""

import pytest
import running
import tiny

from xfuser.testing import oracle

STEPS = 4


def degrees(ranks, warmup=1, **others):
    return {"distrifusion_degree": ranks, "warmup_steps": warmup, **others}


def call_of(family, images=1, **changes):
    return tiny.call_of(family, images, **{"num_inference_steps": STEPS} | changes)


def defined(path, call, semantics, scheduler=None):
    """Run the unwrapped pipeline within a context of the oracle."""
    pipe = running.loaded(path)
    original = pipe.scheduler
    pipe.scheduler = scheduler.from_config(original.config) if scheduler else original
    try:
        with semantics(pipe):
            return running.array(pipe(**call, generator=running.seeded()))
    finally:
        pipe.scheduler = original


def check(pool, ranks, path, asked, call, expected, scheduler=None):
    for picture in pool.run(ranks, running.wrapped, path, asked, call, scheduler):
        assert running.error(picture, expected) <= running.TOLERANCE


@pytest.mark.parametrize("family", ["flux", "hunyuan_dit", "pixart_alpha", "sd3"])
def test_waiting_steps_equal_serial(pool, folder_of, family):
    path, call = folder_of(family), call_of(family, 3)
    expected = running.bare(path, call)
    check(pool, 3, path, degrees(3, STEPS), call, expected)
    check(pool, 2, path, degrees(2, 0, distrifusion_mode="full_sync"), call, expected)


@pytest.mark.parametrize("family", ["flux", "pixart_sigma", "sd3"])
@pytest.mark.parametrize("mode", ["corrected_async_gn", "no_sync"])
def test_asynchronous_steps_equal_the_oracle(pool, folder_of, family, mode):
    path, call = folder_of(family, True), call_of(family)
    serial = running.bare(path, call)
    for ranks, warmup in ((2, 1), (3, 2), (4, 0)):
        expected = defined(path, call, lambda pipe: oracle.distrifusion(pipe, ranks, warmup, mode != "no_sync"))  # noqa: B023
        assert warmup == 2 or running.error(expected, serial) >= 1e-2  # staleness has an effect
        check(pool, ranks, path, degrees(ranks, warmup, distrifusion_mode=mode), call, expected)


@pytest.mark.parametrize("images", [1, 3])
@pytest.mark.parametrize("hybrid", [{"use_cfg_parallel": True}, {"data_parallel_degree": 2}])
@pytest.mark.parametrize("family", ["pixart_sigma", "sd3"])
def test_hybrids_equal_the_oracle(pool, folder_of, family, hybrid, images):
    path, call = folder_of(family, True), call_of(family, images)
    expected = defined(path, call, lambda pipe: oracle.distrifusion(pipe, 2, 1))
    check(pool, 4, path, degrees(2) | hybrid, call, expected)


def test_guidance_in_two_calls_keeps_their_keys_apart(pool, folder_of):
    """Flux' true guidance: each branch has the KV of its own previous call, also if it has its own ranks."""
    path = folder_of("flux", True)
    call = call_of("flux", 3, true_cfg_scale=3.0, negative_prompt=["an old fox"] * 3)
    expected = defined(path, call, lambda pipe: oracle.distrifusion(pipe, 2, 1))
    check(pool, 2, path, degrees(2), call, expected)
    check(pool, 4, path, degrees(2, use_cfg_parallel=True), call, expected)


def test_a_schedule_with_several_calls_a_step(pool, folder_of):
    import diffusers

    path, call = folder_of("sd3", True), call_of("sd3")
    scheduler = diffusers.FlowMatchHeunDiscreteScheduler
    expected = defined(path, call, lambda pipe: oracle.distrifusion(pipe, 2, 1), scheduler)
    check(pool, 2, path, degrees(2), call, expected, scheduler)


@pytest.mark.parametrize("scheme", ["row", "col", "alternate"])
@pytest.mark.parametrize("family", ["pixart_sigma", "sd3"])
def test_naive_patches_know_nothing_of_each_other(pool, folder_of, family, scheme):
    path, call = folder_of(family, True), call_of(family)
    expected = defined(path, call, lambda pipe: oracle.naive(pipe, 3, scheme))
    assert running.error(expected, running.bare(path, call)) >= 1e-2
    check(pool, 3, path, {"naive_patch_degree": 3, "split_scheme": scheme}, call, expected)


def test_a_second_picture_starts_anew(pool, folder_of):
    """Nothing is left of the first image's KV, also if the second one has another size."""
    path = folder_of("sd3", True)
    calls = [call_of("sd3"), call_of("sd3", 2, height=48), call_of("sd3")]
    expected = [defined(path, call, lambda pipe: oracle.distrifusion(pipe, 2, 1)) for call in calls]
    for pictures in pool.run(2, running.wrapped_calls, path, degrees(2), calls):
        for picture, one in zip(pictures, expected, strict=True):
            assert running.error(picture, one) <= running.TOLERANCE


def bad(path, asked):
    try:
        running.wrap(running.loaded(path), asked)
    except ValueError as error:
        return str(error)


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"distrifusion_degree": 2, "pipefusion_parallel_degree": 2}, "exclude each other: choose one"),
        ({"distrifusion_degree": 2, "ulysses_degree": 2}, "exclude each other: choose one"),
        ({"distrifusion_degree": 2, "naive_patch_degree": 2}, "exclude each other: choose one"),
        ({"distrifusion_degree": 4, "distrifusion_mode": "async"}, "known are corrected_async_gn"),
        ({"naive_patch_degree": 4, "split_scheme": "diagonal"}, "known are row, col, alternate"),
        ({"distrifusion_degree": 4, "warmup_steps": 21}, "warmup_steps=21 must be from 0"),
    ],
)
def test_what_excludes_each_other_is_refused(pool, folder_of, asked, message):
    assert all(message in said for said in pool.run(4, bad, folder_of("sd3"), asked))
