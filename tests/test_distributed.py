"""Groups and collectives."""

import os
import subprocess
import sys
import time
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import accelerator
import numpy as np
import pytest
import running
import torch
import torch.distributed as dist

from xfuser import xFuserArgs
from xfuser.bench import timeline
from xfuser.bench.exits import SCRIPTS, exit_codes
from xfuser.cli import main as cli
from xfuser.core import device as devices, distributed, meters
from xfuser.core.distributed import RankGenerator, ending, environment
from xfuser.core.distributed.utils import split_sequence_group, split_sizes
from xfuser.pipeline_io.agreement import shared_arguments
from xfuser.weights.loading import _fetched
from xfuser.weights.placement import join_groups


def test_rank_order_is_tensor_sequence_pipeline_guidance_data():
    grid = RankGenerator(tp=2, sp=4, pp=2, cfg=2, dp=2, order="tp-sp-pp-cfg-dp")
    assert grid.world_size == 64
    assert grid.get_ranks("tp")[:2] == [[0, 1], [2, 3]]
    assert grid.get_ranks("sp")[0] == [0, 2, 4, 6]
    assert grid.get_ranks("pp")[0] == [0, 8]
    assert grid.get_ranks("cfg")[0] == [0, 16]
    assert grid.get_ranks("dp")[0] == [0, 32]
    assert grid.get_ranks("tp-sp")[0] == list(range(8))
    for token in ("tp", "sp", "pp", "cfg", "dp"):
        assert sorted(rank for ranks in grid.get_ranks(token) for rank in ranks) == list(range(64))


def test_ulysses_ranks_are_neighbours_and_ring_ranks_are_not():
    assert split_sequence_group([0, 1, 2, 3], 2) == ([[0, 1], [2, 3]], [[0, 2], [1, 3]])


def test_wrong_order_is_refused():
    with pytest.raises(ValueError, match="must name each of"):
        RankGenerator(1, 2, 1, 2, 1, order="tp-sp")


@pytest.mark.parametrize(("total", "parts"), [(7, 3), (2, 4), (0, 2), (8, 2)])
def test_shares_are_even_to_one(total, parts):
    sizes = split_sizes(total, parts)
    assert sum(sizes) == total and len(sizes) == parts and max(sizes) - min(sizes) <= 1


def limits_of_groups():
    """Return the timeouts of the groups of a configuration, for collectives on the CPU."""
    before, ending.TIME_LIMIT = ending.TIME_LIMIT, timedelta(minutes=33)
    try:
        join_groups(xFuserArgs(ulysses_degree=2).create_config()[0])
        group = distributed.get_sp_group().device_group
        return group._get_backend(torch.device("cpu")).options._timeout
    finally:
        ending.TIME_LIMIT = before


def test_groups_wait_for_ranks_that_compile(pool):
    assert pool.run(2, limits_of_groups) == [timedelta(minutes=33)] * 2


def test_getters_raise_where_nothing_is_initialised():
    for getter in (distributed.get_world_group, distributed.get_sp_group, distributed.get_ring_parallel_rank):
        with pytest.raises(RuntimeError, match="not initialised: call"):
            getter()
    assert not distributed.model_parallel_is_initialized()


def collectives():
    distributed.init_distributed_environment()
    group = distributed.get_world_group()
    rank, size = group.rank_in_group, group.world_size
    uneven = torch.arange(2.0 * (rank + 1)).reshape(rank + 1, 2) + 10 * rank
    gathered = group.all_gather(uneven.T, dim=1)  # not contiguous, with a different length on each rank
    expected = torch.cat([torch.arange(2.0 * (r + 1)).reshape(r + 1, 2) + 10 * r for r in range(size)]).T
    assert torch.equal(gathered, expected)
    parts = group.all_gather(torch.full((2, rank), float(rank)), dim=-1, separate_tensors=True)
    assert [part.shape[1] for part in parts] == list(range(size))
    assert group.all_reduce(torch.tensor([rank + 1.0])).item() == size * (size + 1) / 2
    columns = torch.full((3, 2), float(rank)).T
    assert torch.equal(group.broadcast(columns, src=1), torch.ones(2, 3))
    assert group.broadcast_object({"from": rank}, src=size - 1) == {"from": size - 1}
    assert group.broadcast_object_list([rank, "x"], src=1) == [1, "x"]
    mixed = {"a": torch.arange(3), "n": 7, "s": "text"} if rank == 0 else None
    mixed = group.broadcast_tensor_dict(mixed)
    assert torch.equal(mixed["a"], torch.arange(3)) and mixed["n"] == 7 and mixed["s"] == "text"
    swapped = group.all_to_all([torch.full((rank + 1, other), float(rank)) for other in range(size)])
    assert [tuple(x.shape) for x in swapped] == [(r + 1, rank) for r in range(size)]
    if rank == 0:
        group.send(torch.arange(4.0), dst=1)
    elif rank == 1:
        assert torch.equal(group.recv(torch.Size([4]), torch.float32, src=0), torch.arange(4.0))
    coming = torch.empty(2)
    works = [group.isend(torch.full((2,), float(rank))), group.irecv(coming)]
    for work in works:
        work.wait()
    assert coming[0].item() == (rank - 1) % size
    group.barrier()
    assert group.all_gather(torch.tensor(float(rank))).tolist() == list(range(size))
    assert group.broadcast(torch.full((1,), float(rank)).expand(3)).tolist() == [0.0] * 3
    half = group.all_gather(torch.full((1,), float(rank), dtype=torch.bfloat16))
    assert half.tolist() == list(range(size))
    neighbours = (group.first_rank, group.last_rank, group.next_rank, group.prev_rank)
    return (*neighbours, group.is_first_rank, group.is_last_rank)


def test_collectives(pool):
    for ranks in (2, 3):
        results = pool.run(ranks, collectives)
        for rank, (first, last, after, before, is_first, is_last) in enumerate(results):
            assert (first, last, after, before) == (0, ranks - 1, (rank + 1) % ranks, (rank - 1) % ranks)
            assert (is_first, is_last) == (rank == 0, rank == ranks - 1)


def places():
    distributed.init_distributed_environment()
    with_error = None
    try:
        distributed.initialize_model_parallel(ulysses_degree=3)
    except ValueError as error:
        with_error = str(error)
    distributed.initialize_model_parallel(classifier_free_guidance_degree=2, ulysses_degree=2)
    first = (
        distributed.get_classifier_free_guidance_rank(),
        distributed.get_ulysses_parallel_rank(),
        distributed.get_sequence_parallel_world_size(),
        distributed.is_dp_last_group(),
        distributed.is_pipeline_first_stage() and distributed.is_pipeline_last_stage(),
    )
    distributed.destroy_model_parallel()
    distributed.initialize_model_parallel(data_parallel_degree=2, sequence_parallel_degree=2, ring_degree=2)
    second = (distributed.get_data_parallel_rank(), distributed.get_ring_parallel_rank())
    return with_error, first, second, distributed.get_sp_group().ranks


def test_groups_of_a_world_of_four(pool):
    for rank, (refusal, first, second, ranks) in enumerate(pool.run(4, places)):
        assert "is 3, the world has 4 ranks" in refusal
        assert first == (rank // 2, rank % 2, 2, rank == 3, True)
        assert second == (rank // 2, rank % 2)
        assert ranks == [rank // 2 * 2, rank // 2 * 2 + 1]


def test_one_process_needs_no_launcher():
    code = (
        "from xfuser.core.distributed import *\n"
        "init_distributed_environment(); initialize_model_parallel()\n"
        "assert get_world_group().world_size == 1 and get_tensor_model_parallel_rank() == 0\n"
        "destroy_distributed_environment(); init_distributed_environment(backend='')\n"
        "initialize_model_parallel(1, 1, None, 1, 1, 1, 1, 'gloo'); print('ok')"
    )
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
    assert done.stdout.strip() == "ok", done.stderr


@pytest.mark.parametrize(
    ("launcher", "message"),
    [
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE=2 is set, and RANK is not: start the ranks with torchrun"),
        ({"RANK": "0"}, "RANK=0 is set, and WORLD_SIZE is not"),
        ({"WORLD_SIZE": "two", "RANK": "0"}, "WORLD_SIZE='two' must be a whole number"),
        ({"WORLD_SIZE": "2", "RANK": "2"}, "rank=2 must be less than world_size=2"),
        ({"LOCAL_RANK": "x"}, "LOCAL_RANK='x' must be a whole number"),
    ],
)
def test_incomplete_environments_of_ranks_are_refused(monkeypatch, launcher, message):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.delenv(name, raising=False)
    for name, value in launcher.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message):
        distributed.init_distributed_environment()
    assert not dist.is_initialized()


def test_a_rank_of_minus_one_is_none(monkeypatch):
    """Some scripts set it without a launcher."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "-1")
    assert environment.launched() == (1, 0) and environment.node_rank(-1, -1) == 0


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"world_size": 0}, "world_size=0 must be a whole number of 1 or more"),
        ({"world_size": 2, "rank": 5}, "rank=5 must be less than world_size=2"),
        ({"world_size": "2", "rank": 0}, "world_size='2' must be a whole number"),
        ({"local_rank": "x"}, "local_rank='x' must be a whole number of 0 or more"),
        ({"backend": "smoke"}, "backend='smoke' is unknown; known are .*gloo"),
    ],
)
def test_what_is_no_rank_of_a_world_is_refused(given, message):
    with pytest.raises(ValueError, match=message):
        distributed.init_distributed_environment(**given)
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"ulysses_degree": "2"}, "ulysses_degree='2' must be a whole number of 1 or more"),
        ({"ulysses_degree": -1, "ring_degree": -1}, "ulysses_degree=-1 must be"),
        ({"ring_degree": None}, "ring_degree=None must be"),
        ({"sequence_parallel_degree": 0}, "sequence_parallel_degree=0 must be"),
        ({"data_parallel_degree": 2}, "the world has 1 ranks"),
        ({"backend": "smoke"}, "backend='smoke' is unknown"),
    ],
)
def test_degrees_of_no_grid_are_refused(monkeypatch, given, message):
    for name in ("RANK", "WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    distributed.init_distributed_environment()
    try:
        with pytest.raises(ValueError, match=message):
            distributed.initialize_model_parallel(**given)
        assert not distributed.model_parallel_is_initialized()
    finally:
        running.leave()


@pytest.fixture
def asked(monkeypatch):
    """The calls that touch one of four fake accelerators, in order."""
    yield accelerator.install(monkeypatch)
    running.leave()


@pytest.mark.parametrize("launcher", [{"LOCAL_RANK": "1", "RANK": "3"}, {"RANK": "1"}])
def test_a_rank_chooses_its_device_before_anything_else(asked, monkeypatch, launcher):
    for name, value in ({"WORLD_SIZE": "4"} | launcher).items():
        monkeypatch.setenv(name, value)
    config, _ = xFuserArgs(ulysses_degree=4, dtype="auto").create_config()
    assert config.runtime_config.memory is None and config.runtime_config.dtype is torch.bfloat16
    bound = {"device_id": torch.device("cuda", 1)}
    assert asked == [("set_device_index", 1), ("init_process_group", "nccl", bound | {"timeout": ending.TIME_LIMIT})]
    assert distributed.get_world_group().device == bound["device_id"] and devices.total_memory() == accelerator.BYTES


def test_a_rank_that_is_given_by_number_chooses_its_device(asked, monkeypatch):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    distributed.init_distributed_environment(world_size=4, rank=2)
    bound = {"device_id": torch.device("cuda", 2)}
    assert asked == [("set_device_index", 2), ("init_process_group", "nccl", bound | {"timeout": ending.TIME_LIMIT})]
    assert devices.group_options(2, "gloo") == {}  # gloo has no device


def test_memory_that_torch_keeps_for_further_tensors_is_free(asked):
    assert devices.free_memory() == accelerator.BYTES // 2 + accelerator.BYTES // 8


def test_what_starts_ranks_touches_no_device(asked, monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    xFuserArgs(ulysses_degree=2).checked()
    monkeypatch.setattr(cli, "launch", lambda ranks, arguments: ranks)
    monkeypatch.setattr(sys, "argv", ["xdit", "--prompt", "a red circle", "--ulysses_degree", "2"])
    assert cli.main() == 2
    assert asked == []


def test_more_ranks_than_accelerators_are_refused(asked, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    for command in (["--prompt", "a red circle"], ["bench", "--ranks", "8", "--configs"]):
        flags = ["ulysses_degree=8"] if "bench" in command else ["--ulysses_degree", "8"]
        monkeypatch.setattr(sys, "argv", ["xdit", *command, *flags])
        assert cli.main() == 1
        told = capsys.readouterr().err
        assert told == "xdit: ValueError: 8 ranks need as many accelerators (here: 4): give smaller degrees\n"
    assert asked == []


def test_a_timeline_of_an_accelerator_is_refused(asked, monkeypatch, capsys, tmp_path):
    """The host does not know when it computes; nor are the times of asynchronous steps told."""
    monkeypatch.delenv("RANK", raising=False)
    flags = ["--output_dir", str(tmp_path), "--timeline", str(tmp_path / "time.png"), "--configs", "ulysses_degree=2"]
    monkeypatch.setattr(sys, "argv", ["xdit", "bench", *flags])
    assert cli.main() == 1 and "timeline shows when ranks compute on CPUs" in capsys.readouterr().err
    assert asked == []
    method = SimpleNamespace(_pipefusion=True)
    monkeypatch.setattr(timeline.SequenceParallel, "_wrapper", lambda method, forward, arguments: "computed")
    with timeline.timeline(meters.Waiting()) as spans:
        assert timeline.SequenceParallel._wrapper(method, None, None) == "computed" and not spans


def test_a_plan_touches_no_device(asked, monkeypatch, capsys):
    command = ["xdit", "plan", "--world_size", "1", "--num_inference_steps", "2", "--dtype", "fp32"]
    monkeypatch.setattr(sys, "argv", command)
    assert cli.main() == 0, capsys.readouterr().out
    assert asked == []


# With a long switch interval, a thread gets the interpreter's lock only when the main thread waits. So objects that
# gloo's threads still hold at the end are held while the interpreter shuts down.
PREPARED = """
import atexit, os, signal, sys, time, torch, torch.distributed as dist
from xfuser.core import distributed
from xfuser.core.distributed import ending, get_sp_group

rank = int(os.environ["RANK"])

def prepare():
    distributed.init_distributed_environment()
    distributed.initialize_model_parallel(ulysses_degree=2)

def reduce():
    sys.setswitchinterval(100)
    many = [torch.ones(1) for _ in range(3000)]  # each takes the lock when it is released
    get_sp_group().device_group.allreduce_coalesced(many).wait()
"""
ENDS = {
    "simply": """
prepare()
reduce()
""",
    "with groups made again, and one in a variable": """
prepare()
for _ in range(2):
    distributed.destroy_model_parallel()
    distributed.initialize_model_parallel(ring_degree=2)
held = get_sp_group().device_group
reduce()
""",
    "after it destroyed everything itself": """
prepare()
reduce()
dist.destroy_process_group()
""",
    "after the other rank was killed": """
prepare()
if rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
try:
    reduce()
except RuntimeError as error:
    print(error)
""",
    "after one rank failed": """
prepare()
if rank == 1:
    raise KeyError("of this rank alone")
reduce()
""",
    "after an error that one rank caught": """
prepare()
try:
    if rank == 1:
        raise KeyError("of this rank alone")
    reduce()
except KeyError as error:
    print(error)
""",
    "while the other rank never comes": """
prepare()
ending.PATIENCE = 1
first = distributed.get_world_group().broadcast_object(os.getpid())
if rank == 0:
    work = dist.all_reduce(torch.ones(4), group=get_sp_group().device_group, async_op=True)
    sys.exit()
for _ in range(300):
    try:
        os.kill(first, 0)
    except ProcessLookupError:
        sys.exit()
    time.sleep(0.1)
sys.exit("the other rank waits")
""",
    "with groups of its own": """
def at_last():
    for group in (None, own):
        x = torch.ones(1)
        dist.all_reduce(x, group=group)
        assert x.item() == 2
    assert len(dist.distributed_c10d._world.pg_map) == 2
    dist.destroy_process_group()
    print("both are there")

atexit.register(at_last)
dist.init_process_group("gloo")
own = dist.new_group([0, 1])
prepare()
reduce()
""",
}
CODES = {
    "after the other rank was killed": [0, -9],
    "after one rank failed": [1, 1],
    "after an error that one rank caught": [1, 0],
}  # all others: 0 and 0


@pytest.mark.parametrize("end", ENDS)
def test_a_script_that_ends(end):
    codes, written = exit_codes(["-c", PREPARED + ENDS[end]])
    assert codes == CODES.get(end, [0, 0]), "\n".join(written)
    if end not in CODES:
        assert not any("Traceback" in text for text in written), "\n".join(written)
    if end == "with groups of its own":
        assert all("both are there" in text for text in written)


@pytest.mark.matrix
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_of_users_simply_end(name, monkeypatch):
    monkeypatch.chdir(Path(__file__).parent.parent)
    codes, written = exit_codes(SCRIPTS[name])
    assert codes == [0, 0], "\n".join(written)


def of_rank_0():
    """Return the inputs that a call uses if ranks pass different ones, by position and by name."""
    xFuserArgs(ulysses_degree=2).create_config()
    rank = dist.get_rank()
    generator, latents = torch.Generator().manual_seed(rank), torch.full((2, 3), float(rank))
    (draw, positional), named = shared_arguments((generator, latents), {"latents": latents + 1, "prompt": "a"})
    with pytest.raises(ValueError, match=r"'latents'\]? is torch.float32 of shape \(1,\) on rank 0") as refused:
        shared_arguments((), {"latents": torch.zeros(rank + 1)})
    return torch.rand(1, generator=draw).item(), positional, named["latents"], torch.rand(1).item(), str(refused.value)


def test_ranks_draw_from_what_rank_0_was_given(pool):
    (number, *first), (other, *second) = pool.run(2, of_rank_0)
    assert number == other and all(torch.equal(a, b) for a, b in zip(first[:2], second[:2], strict=True))
    assert first[0].abs().max() == 0 and first[2:] == second[2:]


ALIKE = {"prompt": "a", "height": 64, "image": [np.zeros((2, 2))], "output_type": "np", "dtype": np.float32}


def with_differences():
    """Return the messages of calls in which rank 1 passes one other argument, and the arguments of an equal call."""
    xFuserArgs(ulysses_degree=2).create_config()
    told = []
    others = {"prompt": ["a", "b"], "height": 80, "image": [np.ones((2, 2))], "output_type": "latent"}
    for name, other in others.items():
        with pytest.raises(ValueError, match="the ranks call the pipeline with different arguments") as refused:
            shared_arguments((), ALIKE | {name: other} if dist.get_rank() else ALIKE)
        told.append(str(refused.value))
    own = {"device": f"cuda:{dist.get_rank()}"}
    own |= {"output_type": "pil", "callback_on_step_end_tensor_inputs": ["latents"]} if dist.get_rank() else {}
    return told, shared_arguments((), ALIKE | own)[1]["prompt"]


def test_ranks_must_be_given_the_same(pool):
    """Otherwise the image would be a mixture of several."""
    for told, prompt in pool.run(2, with_differences):
        assert "[1]['height'] is 64 on rank 0, 80 on rank 1" in told[1]
        assert all(name in one for name, one in zip(ALIKE, told, strict=False)) and prompt == "a"


def slow_download(pause):
    class Hub:
        @staticmethod
        def download(model, **options):
            time.sleep(pause if dist.get_rank() == 0 else 0)
            return model

    xFuserArgs(ulysses_degree=2).create_config()
    world = distributed.get_world_group()
    world.local_rank = dist.get_rank()
    world.cpu_group = world.device_group = dist.new_group(timeout=timedelta(seconds=1))
    return _fetched("on/the-hub", Hub, {})


def test_ranks_wait_for_a_download_for_longer_than_for_a_collective(pool):
    assert pool.run(2, slow_download, 4) == ["on/the-hub"] * 2
