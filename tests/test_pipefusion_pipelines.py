"""PipeFusion of whole pipelines whose transformers take more than latents and text equals the oracle."""

from dataclasses import replace

import pytest
import running
import whole
from whole import WHOLE

from xfuser.testing import matrix, oracle
from xfuser.testing.loop import loop_of
from xfuser.testing.zoo import FAMILIES

PARTS = {
    "pipefusion2": (2, {"pipefusion_parallel_degree": 2}),
    "pipefusion2 x ulysses2": (4, {"pipefusion_parallel_degree": 2, "ulysses_degree": 2}),
    "pipefusion2 x cfg2": (4, {"pipefusion_parallel_degree": 2, "use_cfg_parallel": True}),
}
RUN = [((2, 1), parts) for parts in PARTS] + [((3, 2), parts) for parts in list(PARTS)[:2]]
LATENT = {"output_type": "latent"}
CASES = {  # pipelines, and changes of their calls
    "wan_two": LATENT | {"num_inference_steps": 7},
    "wan_two_i2v": LATENT | {"num_inference_steps": 7},
    "flux_kontext": LATENT | {"num_inference_steps": 4},
    "flux2": LATENT | {"num_inference_steps": 4},
    "qwen_image_edit": LATENT,
    "cogview4": LATENT | {"num_inference_steps": 4, "num_images_per_prompt": 3},  # one negative prompt for three images
}


displaced, serial = running.remembered(whole.displaced), running.remembered(whole.draw)


@pytest.fixture(scope="session")
def path_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return lambda name: whole.save(name, root)


def drawn_with(path, name, degrees, changes):
    return whole.draw(path, name, degrees, **changes)


@pytest.mark.parametrize(("defined", "parts"), RUN)
@pytest.mark.parametrize("case", CASES)
def test_pipeline_equals_the_oracle(pool, path_of, case, defined, parts):
    path, changes, (ranks, degrees) = path_of(case), CASES[case], PARTS[parts]
    expected = displaced(path, case, *defined, **changes)
    assert running.error(expected[0], serial(path, case, None, **changes)[0]) >= 100 * running.TOLERANCE
    degrees = degrees | {"num_pipeline_patch": defined[0], "warmup_steps": defined[1]}
    for results in pool.run(ranks, drawn_with, path, case, degrees, changes):
        for result, reference in zip(results, expected, strict=True):
            assert running.error(result, reference) <= WHOLE[case].tolerance


OF_BLOCKS = {  # families whose blocks each take their own text: latents, patches, synchronous steps
    "hidream": ((4, 4, 8), 2, 1),  # 10 tokens follow those of the image
    "bria_fibo": ((15, 8), 4, 1),
}


def looped(name, degrees):
    family = replace(FAMILIES[name], latents=OF_BLOCKS[name][0])
    return matrix.draw_family(family, degrees, {"images": 2, "guidance": "sequential"})


@pytest.mark.parametrize("name", OF_BLOCKS)
def test_text_of_every_block(pool, name):
    latents, patches, warmup = OF_BLOCKS[name]
    family = replace(FAMILIES[name], latents=latents)
    pipe = loop_of(family)
    with oracle.displaced(pipe, patches, warmup):
        expected = pipe(family, images=2, guidance="sequential")
    assert matrix.error(looped(name, None), expected) >= 100 * matrix.TOLERANCE  # staleness has an effect
    degrees = {"pipefusion_parallel_degree": 4, "num_pipeline_patch": patches, "warmup_steps": warmup}
    for result in pool.run(4, looped, name, degrees):
        assert matrix.error(result, expected) <= matrix.TOLERANCE


@pytest.mark.parametrize("case", ["flux_kontext", "flux2", "qwen_image_edit"])
def test_patches_that_have_fewer_tokens_than_ranks(pool, path_of, case):
    """Condition images have more tokens than the latents, and do not count as tokens of the patches."""
    path, changes = path_of(case), CASES[case]
    patches = rows_of(path, case) // 2 + 1
    expected = displaced(path, case, patches, 1, **changes)
    degrees = {"ulysses_degree": 2, "pipefusion_parallel_degree": 2, "num_pipeline_patch": patches, "warmup_steps": 1}
    for results in pool.run(4, drawn_with, path, case, degrees, changes):
        assert running.error(results[0], expected[0]) <= WHOLE[case].tolerance


def rows_of(path, case):
    return serial(path, case, None, **CASES[case])[0].shape[1]


def refused(path, case, patches):
    """Return the message of the refusal, and the number of transformer calls before it."""
    calls = []
    hook = whole.loaded(path, case).transformer.register_forward_pre_hook(lambda *_: calls.append(1))
    degrees = {"pipefusion_parallel_degree": 1, "num_pipeline_patch": patches}
    parallel = running.wrap(whole.loaded(path, case), degrees)
    try:
        with WHOLE[case].within(), pytest.raises(ValueError) as error:
            parallel(**whole.call_of(case))
        return str(error.value), len(calls)
    finally:
        hook.remove()
        parallel.unwrap()


@pytest.mark.parametrize("case", ["flux_kontext", "flux2", "qwen_image_edit"])
def test_more_patches_than_rows_of_latents_are_refused_ahead_of_the_transformer(pool, path_of, case):
    rows = rows_of(path_of(case), case)
    for message, calls in pool.run(1, refused, path_of(case), case, rows + 1):
        assert f"num_pipeline_patch={rows + 1} is more than the {rows} rows" in message and calls == 0
