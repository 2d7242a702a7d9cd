"""PipeFusion of whole pipelines whose transformers see more than latents and text: equal to the oracle."""

import pytest
import running
import whole
from whole import WHOLE

PARTS = {  # on the first, in the default run
    "pipefusion2": (2, {"pipefusion_parallel_degree": 2}),
    "pipefusion2 x ulysses2": (4, {"pipefusion_parallel_degree": 2, "ulysses_degree": 2}),
    "one stage": (1, {}),
    "pipefusion2 x cfg2": (4, {"pipefusion_parallel_degree": 2, "use_cfg_parallel": True}),
}
CASES = {  # pipelines, and changes of their calls
    "wan_two": {"num_inference_steps": 7},
    "wan_two_i2v": {"num_inference_steps": 7},
    "flux_kontext": {"num_inference_steps": 4},
    "flux2": {"num_inference_steps": 4},
    "qwen_image_edit": {},
}


@pytest.fixture(scope="session")
def path_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("pipelines")
    return lambda name: whole.save(name, root)


def drawn_with(path, name, degrees, changes):
    return whole.draw(path, name, degrees, **changes)


@pytest.mark.parametrize("parts", PARTS)
@pytest.mark.parametrize(("patches", "warmup"), [(2, 1), (3, 2)])
@pytest.mark.parametrize("case", CASES)
def test_pipeline_equals_the_oracle(pool, path_of, case, patches, warmup, parts):
    path, changes, (ranks, degrees) = path_of(case), CASES[case], PARTS[parts]
    expected = whole.displaced(path, case, patches, warmup, **changes)
    assert running.error(expected[0], whole.draw(path, case, None, **changes)[0]) >= 100 * running.TOLERANCE
    degrees = degrees | {"num_pipeline_patch": patches, "warmup_steps": warmup}
    for results in pool.run(ranks, drawn_with, path, case, degrees, changes):
        for result, reference in zip(results, expected, strict=True):
            assert running.error(result, reference) <= WHOLE[case].tolerance
