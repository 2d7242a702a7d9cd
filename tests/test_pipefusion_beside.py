"""PipeFusion of transformers with more than one chain of blocks: hints of a second chain, modules between blocks."""

from dataclasses import replace

import pytest
import running

from xfuser.testing import matrix, oracle
from xfuser.testing.loop import loop_of
from xfuser.testing.zoo import FAMILIES

PATCHES = {"num_pipeline_patch": 3, "warmup_steps": 1}
CASES = {  # blocks that take hints, number of blocks per stage
    "none on a stage between": ([0, 5], [1, 2, 3]),
    "the first one on the second stage": ([0, 1, 3], [1, 5]),
    "none on the last stage": ([0, 2], [2, 2, 1, 1]),
}


def vace(layers):
    """Return Wan VACE with six blocks, of which ``layers`` take hints."""
    known = FAMILIES["wan_vace"]
    return replace(known, config=known.config | {"num_layers": 6, "vace_layers": layers})


@running.remembered
def displaced(layers, **call):
    pipe = loop_of(vace(layers))
    with oracle.displaced(pipe, PATCHES["num_pipeline_patch"], PATCHES["warmup_steps"]):
        return pipe(vace(layers), **call)


def drawn(layers, degrees, call):
    return matrix.draw_family(vace(layers), degrees, call)


@pytest.mark.parametrize("case", CASES)
def test_hints_equal_the_oracle_wherever_they_are_added(pool, case):
    layers, stages = CASES[case]
    call = {"num_inference_steps": 3, "guidance": "sequential"}
    expected = displaced(layers, **call)
    assert matrix.error(expected, drawn(layers, None, call)) >= 1e-3  # staleness has an effect
    degrees = PATCHES | {"pipefusion_parallel_degree": len(stages), "attn_layer_num_for_pp": stages}
    for result in pool.run(len(stages), drawn, layers, degrees, call):
        assert matrix.error(result, expected) <= matrix.TOLERANCE


def weights(layers, stages):
    """Return the number of weights of each stack on this stage, and in the unwrapped model afterwards."""
    pipe = loop_of(vace(layers))
    before = running.fingerprint(pipe)
    degrees = PATCHES | {"pipefusion_parallel_degree": len(stages), "attn_layer_num_for_pp": stages}
    parallel = running.wrap(pipe, degrees)
    model = pipe.transformer
    held = [
        [any(not x.is_meta for x in block.parameters()) for block in blocks]
        for blocks in (model.blocks, model.vace_blocks)
    ]
    parallel.unwrap()
    return held, before == running.fingerprint(pipe)


def test_a_stage_has_the_blocks_whose_hints_it_adds(pool):
    found = pool.run(2, weights, [0, 2, 3], [3, 3])
    assert [held[1] for held, _ in found] == [[True, False, False], [False, True, True]]
    assert all(same for _, same in found)


BETWEEN = {"consisid": "perceiver_cross_attention", "wan_animate": "face_adapter"}


def runs(family, steps):
    """Return how often this stage runs each of the modules between blocks."""
    pipe, counts = loop_of(FAMILIES[family]), {}
    for name, module in pipe.transformer.get_submodule(BETWEEN[family]).named_children():
        counts[name] = 0
        module.to_q.register_forward_hook(lambda *_, name=name: counts.update({name: counts[name] + 1}))
    parallel = running.wrap(pipe, PATCHES | {"pipefusion_parallel_degree": 2})
    parallel(FAMILIES[family], num_inference_steps=steps)
    parallel.unwrap()
    return counts


@pytest.mark.parametrize("family", BETWEEN)
def test_modules_between_blocks_run_on_one_stage(pool, family):
    first, second = pool.run(2, runs, family, 3)
    assert {name: first[name] + second[name] for name in first} == dict.fromkeys(first, 1 + 2 * 3)
    assert all(0 in pair for pair in zip(first.values(), second.values(), strict=True))
