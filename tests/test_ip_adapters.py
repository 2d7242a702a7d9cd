"""IP-adapters of transformers: image tokens attend again, to keys that are not tokens of the sequence."""

import adapters
import pytest
import running
import tiny
import torch
import whole
from torch._dynamo.utils import counters

from xfuser.testing import oracle

USP = {"ulysses_degree": 2, "ring_degree": 2}
PIPED = {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 3, "warmup_steps": 1}
FOUR_STEPS = {"num_inference_steps": 4}


@pytest.fixture(scope="session")
def path_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("adapted")
    return lambda family: whole.save(family, root) if family in whole.WHOLE else tiny.save(family, root, attentive=True)


def check(pool, path, ranks, family, degrees, reference=None, **changes):
    expected = adapters.draw(path, family, reference, **changes)
    for result in pool.run(ranks, draw, path, family, degrees, changes):
        assert running.error(result, expected) <= running.TOLERANCE
    return expected


def draw(path, family, degrees, changes):
    return adapters.draw(path, family, degrees, **changes)


@pytest.mark.parametrize(
    ("family", "ranks", "degrees", "changes"),
    [
        ("flux", 4, USP, {"adapters": 2, "scale": [0.5, [0.7, -1.0]]}),
        ("flux", 2, {"ulysses_degree": 2}, {}),
        ("flux", 2, {"ring_degree": 2}, {"scale": 0.4}),
        ("flux", 2, {"use_cfg_parallel": True}, {"adapters": 2}),
        ("flux", 2, {"data_parallel_degree": 2}, {"images": 3}),
        ("flux", 2, {"tensor_parallel_degree": 2}, {}),
        ("flux", 2, {"fully_shard_degree": 2, "ulysses_degree": 2}, {}),
        ("sd3", 4, USP, {}),
        ("sd3", 2, {"ulysses_degree": 2}, {"images": 3, "scale": 0.4}),
        ("sd3", 2, {"ring_degree": 2}, {"scale": 0.0}),
        ("sd3", 2, {"use_cfg_parallel": True}, {}),
        ("sd3", 2, {"tensor_parallel_degree": 2}, {}),
        ("chroma", 4, USP, {"adapters": 2}),
    ],
)
def test_adapters_equal_serial(pool, path_of, family, ranks, degrees, changes):
    check(pool, path_of(family), ranks, family, degrees, **changes)


def displaced(pipe):
    return oracle.displaced(pipe, 3, 1)


def lagging(pipe):
    return oracle.distrifusion(pipe, 2, 1)


@pytest.mark.parametrize("family", ["flux", "sd3", "chroma"])
@pytest.mark.parametrize(
    ("ranks", "degrees", "semantics"),
    [(4, PIPED | {"ulysses_degree": 2}, displaced), (2, {"distrifusion_degree": 2, "warmup_steps": 1}, lagging)],
)
def test_adapters_equal_the_oracle(pool, path_of, family, ranks, degrees, semantics):
    path = path_of(family)
    expected = check(pool, path, ranks, family, degrees, reference=semantics, **FOUR_STEPS)
    for others in (
        adapters.draw(path, family, None, **FOUR_STEPS),
        adapters.draw(path, family, semantics, scale=0.0, **FOUR_STEPS),
    ):
        assert running.error(expected, others) > 100 * running.TOLERANCE


def draw_late(path, family, degrees, scale):
    return adapters.draw_late(path, family, degrees, scale, **FOUR_STEPS)


@pytest.mark.parametrize(("family", "scale"), [("flux", [0.4, 1.5]), ("sd3", 0.7)])
def test_adapters_reach_all_stages_when_they_are_loaded_into_the_wrapped_pipeline(pool, path_of, family, scale):
    path, changes = path_of(family), {"scale": scale} | FOUR_STEPS
    expected = [adapters.draw(path, family, semantics, **changes) for semantics in (displaced, None)]
    for results in pool.run(2, draw_late, path, family, PIPED, scale):
        for result, reference in zip(results, expected, strict=True):
            assert running.error(result, reference) <= running.TOLERANCE


def refused(path, degrees):
    pipe = adapters.loaded.__wrapped__(path, "flux", 0)
    parallel = running.wrap(pipe, degrees)
    with pytest.raises(ValueError, match=r"load_ip_adapter: this rank has a part .* call it before the wrap"):
        adapters.load(parallel, "flux", 1)
    adapters.load(parallel.unwrap(), "flux", 1)
    assert not {"load_ip_adapter", "set_ip_adapter_scale"} & vars(pipe).keys()


def test_loading_into_divided_weights_is_refused(pool, path_of):
    pool.run(2, refused, path_of("flux"), {"tensor_parallel_degree": 2})
    pool.run(4, refused, path_of("flux"), PIPED | {"tensor_parallel_degree": 2})


def compiled(path, family, degrees):
    pipe = adapters.loaded.__wrapped__(path, family, 1)
    pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager")
    parallel = running.wrap(pipe, degrees)
    parallel.set_ip_adapter_scale(1.0)
    counters.clear()
    picture = running.array(parallel(**adapters.call_of(family, 1, 1), generator=running.seeded()))
    parallel.unwrap()
    return picture, counters["stats"]["unique_graphs"], dict(counters["graph_break"])


@pytest.mark.matrix
def test_compiled_blocks_attend_to_adapters(pool, path_of):
    expected = adapters.draw(path_of("sd3"), "sd3", None)
    for picture, graphs, breaks in pool.run(2, compiled, path_of("sd3"), "sd3", {"ulysses_degree": 2}):
        assert (graphs, breaks) == (3, {})
        assert running.error(picture, expected) <= running.TOLERANCE
