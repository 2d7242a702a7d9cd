"""PipeFusion of whole pipelines whose transformers see more than latents and text: equal to the oracle."""

import pytest
import running
import whole
from whole import WHOLE

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
