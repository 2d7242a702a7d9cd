"""No combination of methods deadlocks under NCCL's ordering rules; gloo's tags and threads would hide a deadlock."""

import copy
from functools import cache

import nccl
import pytest
import running
import tiny

from xfuser import parallel

STEPS = 3  # a synchronous step, the first asynchronous one, and one after it
COMBINATIONS = {
    "plain": {},
    "cfg2": {"use_cfg_parallel": True},
    "ulysses2": {"ulysses_degree": 2},
    "ring2": {"ring_degree": 2},
    "dp2": {"data_parallel_degree": 2},
    "cfg2-ulysses2": {"use_cfg_parallel": True, "ulysses_degree": 2},
}
MORE = {4: ("plain", "ring2", "cfg2-ulysses2"), 8: ("plain",)}  # with more than 2 stages, run only these
# PixArt has no text or skips to send, so its messages are a subset of those of Hunyuan-DiT.
CELLS = [("pixart_sigma", stages, "plain") for stages in (2, *MORE)]
CELLS += [
    (family, stages, others)
    for family in ("hunyuan_dit", "flux")
    for stages in (2, *MORE)
    for others in MORE.get(stages, COMBINATIONS)
]


@cache
def made(family, stages):
    """Return a tiny pipeline with two blocks per stage."""
    blocks = max(4, 2 * stages)
    pipe = tiny.FAMILIES[family]()
    if family == "hunyuan_dit":
        config = dict(pipe.transformer.config) | {"num_layers": blocks}
        pipe.transformer = type(pipe.transformer).from_config(config)
    elif family == "flux":
        pipe.transformer = tiny.flux_transformer(num_layers=blocks // 2, num_single_layers=blocks // 2)
    else:
        pipe.transformer = tiny.pixart_transformer(num_layers=blocks)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pipeline_of(family, stages):
    """Return the pipeline with its own transformer, as each rank drops the blocks of other stages."""
    pipe = made(family, stages)
    return type(pipe)(**pipe.components | {"transformer": copy.deepcopy(pipe.transformer)})


def program(pipe, rank, ranks, asked, call):
    with nccl.recorded(rank, ranks) as recorded:
        running.wrap(pipe, asked)(**call)
        return recorded


def programs(monkeypatch, family, stages, patches, others, call):
    monkeypatch.setattr(parallel, "shared_arguments", lambda args, kwargs: (args, kwargs))
    asked = {"pipefusion_parallel_degree": stages, "num_pipeline_patch": patches, "num_inference_steps": STEPS} | others
    ranks = stages * (2 ** len(others))
    found = []
    for rank in range(ranks):
        found.append(program(pipeline_of(family, stages), rank, ranks, asked, call))
        running.leave()
    return found


@pytest.mark.parametrize(("family", "stages", "others"), CELLS)
def test_no_deadlock(monkeypatch, family, stages, others):
    call = tiny.call_of(family, 2, num_inference_steps=STEPS, height=128, output_type="latent")
    if family == "flux" and "cfg2" in others:
        call |= {"true_cfg_scale": 2.0, "negative_prompt": ["a cat"] * 2}
    found = programs(monkeypatch, family, stages, stages, COMBINATIONS[others], call)
    assert any(event[0] == "send" for event in found[0])
    assert nccl.replay(found) == []


@pytest.mark.parametrize("stages", [2, 4])
def test_no_deadlock_with_a_callback(monkeypatch, stages):
    call = tiny.call_of("flux", 1, num_inference_steps=STEPS, callback_on_step_end=lambda pipe, i, t, values: values)
    assert nccl.replay(programs(monkeypatch, "flux", stages, 3, {}, call)) == []


def test_the_replay_finds_deadlocks():
    """Two ranks both send first on one communicator."""
    send = [("send", "g", (0, 1), 1, 4), ("wait", 0), ("receive", "g", (0, 1), 1, 4), ("wait", 2)]
    other = [("send", "g", (0, 1), 0, 4), ("wait", 0), ("receive", "g", (0, 1), 0, 4), ("wait", 2)]
    assert nccl.replay([send, other])
    assert nccl.replay([send, [other[2], ("wait", 0), other[0], ("wait", 2)]]) == []
