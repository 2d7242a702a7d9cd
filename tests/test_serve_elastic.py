"""`xdit serve --elastic`: calls run on the ranks that end them soonest, images are the same, and a short fault run."""

import asyncio

import openai
import pytest
import running
import test_serve
from test_serve import draw, in_thread, same, serial

from xfuser.bench import serve as bench
from xfuser.config import xFuserArgs
from xfuser.config.args import SHIPPED_PIPELINE
from xfuser.planner.machines import machine_of
from xfuser.serve import command, elastic, server
from xfuser.serve.jobs import Job
from xfuser.testing import faults
from xfuser.testing.serving import until

SETTINGS = {"height": 64, "width": 64, "num_frames": None, "num_inference_steps": 10}
MEASURED = {1: [(64**2, 0.1), (1024**2, 8.0)], 2: [(64**2, 0.2), (1024**2, 4.5)], 4: [(64**2, 0.3), (1024**2, 2.5)]}


@pytest.fixture
def client(elastic_served):
    elastic_served.ready()
    return openai.OpenAI(base_url=f"{elastic_served.url}/v1", api_key="none", max_retries=0, timeout=300)


def job(side, **fields):
    return Job("a", "", 0, SETTINGS | {"height": side, "width": side}, **fields)


def predict(jobs, size):
    return elastic.seconds(jobs, size, MEASURED)


def placed(*calls):
    return [(jobs, [*ranks]) for jobs, ranks, _ in elastic.placed(list(calls), [0.0] * 4, predict, [1, 2, 4], 1.0)]


def test_calls_go_to_the_ranks_by_which_they_end_soonest():
    small, medium, large = [job(64)], [job(256)], [job(1024)]
    assert placed(small) == [(small, [0])] and placed(large) == [(large, [0, 1, 2, 3])]
    assert placed(medium) == [(medium, [0, 1, 2, 3])]
    assert placed(*[medium] * 4) == [(medium, [rank]) for rank in range(4)], "the last one would end later if it waited"
    assert placed(large, *[small] * 4) == [(large, [0, 1]), (small, [2]), (small, [3])]
    assert placed([job(64, ranks={2: 0.0, 4: 0.0})])[0][1] == [0, 1], "one rank lacks the memory"
    assert placed([job(64, ranks={1: 9.0, 4: 1.0})])[0][1] == [0, 1, 2, 3], "the planner's times"


def test_a_large_picture_begins_though_small_ones_keep_coming():
    large, until, now = [job(1024, ranks={4: 0.0})], [1.0, 1.2, 1.4, 1.6], 0.0
    while now < 10:
        until = [0.0 if end <= now else end for end in until]
        for jobs, ranks, end in elastic.placed([large, *([job(64)] for _ in range(8))], until, predict, [1, 2, 4], now):
            if jobs is large:
                assert now < 2
                return
            for rank in ranks:
                until[rank] = end
        now += 0.1
    raise AssertionError("the large image did not begin")


def test_the_planner_says_how_many_ranks_have_the_memory_and_how_long_they_take(monkeypatch):
    monkeypatch.setattr(server, "calibrated", lambda: machine_of("CPU"))
    flags = ["--ulysses_degree", "2", "--use_parallel_vae", "--memory", "150MB"]
    flags += ["--elastic", "--no_use_resolution_binning"]
    args, options = command.parsed(flags)
    served = server.Server(args, options)
    seconds = served.ranks_for(SETTINGS | {"height": 256, "width": 256})
    assert 0 < seconds[2] < seconds[1]
    assert list(served.ranks_for(SETTINGS | {"height": 1024, "width": 1024})) == [2]


def test_what_elastic_does_not_go_with_is_refused_before_ranks_start():
    for flags, told in [
        ({"tensor_parallel_degree": 2}, "tensor_parallel_degree=2"),
        ({"pipefusion_parallel_degree": 2}, "pipefusion_parallel_degree=2"),
        ({"ulysses_degree": 2, "fully_shard_degree": 2}, "fully_shard_degree=2"),
        ({"ulysses_degree": 2, "text_encoder": "shard"}, "text_encoder=shard"),
        ({"distrifusion_degree": 2}, "distrifusion_degree=2"),
        ({}, "requires more than one rank: give use_cfg_parallel, ulysses_degree"),
    ]:
        arguments = ["--elastic"]
        for name, value in flags.items():
            arguments += [f"--{name}", str(value)]
        with pytest.raises(ValueError, match=told):
            command.main(arguments)


def test_degrees_of_a_team_divide_those_of_all():
    config = xFuserArgs(model="shapes-256", use_cfg_parallel=True, ulysses_degree=6, ring_degree=2).checked()[0]
    assert elastic.sizes_of(config.world_size, True) == [1, 2, 3, 4, 6, 8, 12, 24]
    for size in elastic.sizes_of(config.world_size, True):
        assert elastic.degrees_of(config.parallel_config, size).world_size == size


@pytest.mark.matrix
def test_pictures_of_all_sizes_at_once_are_those_drawn_alone(elastic_served, client):
    """Calls on one rank or both; two at a time on one rank each, one of them cancelled; then a batch."""
    events = client.images.generate(
        prompt=test_serve.PROMPT, size="64x64", stream=True, extra_body={"num_inference_steps": faults.SLOW}
    )
    next(event for event in events if event.step > 0)
    slow = in_thread(draw, client, steps=faults.SLOW, seed=7, size="64x64")
    until(lambda: elastic_served.metric("xdit_running") == 2, "two calls at a time")
    assert elastic_served.metric('xdit_calls_total{ranks="1"}') >= 2
    sides, seeds = (64, 128, 256, 64, 96), range(5)
    drawn = [in_thread(draw, client, seed=seed, size=f"{side}x{side}") for seed, side in zip(seeds, sides, strict=True)]
    until(lambda: elastic_served.health()["queue"] == 5, "five waiting images")
    events.close()
    for seed, side, picture in zip(seeds, sides, drawn, strict=True):
        assert same(picture.result(), serial(seed=seed, side=side, binning=False))
    assert same(slow.result(), serial(seed=7, steps=faults.SLOW, side=64, binning=False))
    assert elastic_served.metric("xdit_restarts_total") == 0


@pytest.mark.matrix
def test_what_one_rank_lacks_the_memory_for_is_drawn_on_both(elastic_served, client):
    before = elastic_served.metric('xdit_calls_total{ranks="2"}')
    picture = draw(client, steps=faults.ONLY_TOGETHER, seed=2, size="64x64")
    assert same(picture, serial(seed=2, steps=faults.ONLY_TOGETHER, side=64, binning=False))
    assert elastic_served.metric('xdit_calls_total{ranks="2"}') == before + 1


@pytest.mark.matrix
def test_of_many_requests_none_is_lost_or_wrong(elastic_served):
    """A short form of ``python -m xfuser.bench.serve``: 40 requests, 2 cancelled, 2 invalid, an exception, a kill."""
    call = {"prompt": bench.PROMPT, "num_inference_steps": test_serve.STEPS, "guidance_scale": 3.5}
    call |= {"max_sequence_length": 256, "use_resolution_binning": False}
    expected = bench.serial_pictures(running.loaded(SHIPPED_PIPELINE), call)
    account = asyncio.run(bench.fault_run(elastic_served.ready(), expected, 40, kills=1, exceptions=1, clients=8))
    ends = account.ends
    assert ends.total() == 40 and account.wrong == 0, account
    assert ends["invalid: invalid_value"] == 2 and ends["raises: pipeline_failed"] == 1, account
    assert ends["cancelled: left"] + ends["cancelled: engine_restarted"] == 2, account
    assert ends["picture: ok"] + ends["picture: engine_restarted"] == 35, account
    assert len(account.killed) == len(account.recovered) == 1 and max(account.after_fault, default=0) <= 10, account
