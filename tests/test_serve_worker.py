"""A rank of the server: a batch gives the same results as its jobs alone, and a cancelled batch leaves no state."""

import io
from contextlib import nullcontext
from multiprocessing import Pipe
from typing import Any

import numpy as np
import pytest
import running
import safetensors.torch
import torch
import whole
from PIL import Image
from torch.distributed import DistBackendError

from xfuser import xFuserArgs
from xfuser.serve import elastic, worker
from xfuser.weights.loading import load_pipeline

SETTINGS = {"height": 80, "width": 48, "num_inference_steps": 3, "guidance_scale": 3.5}
PROMPTS = ("a red circle", "the cat above a green square above a blue circle", "a")


def job(number: int, prompt: str = PROMPTS[0], **fields: Any) -> dict[str, Any]:
    plain = {"negative_prompt": "", "settings": SETTINGS, "image": None, "preview_every": 0}
    return plain | {"id": str(number), "prompt": prompt, "seed": number} | fields


def draws(path: str, batches: list[Any], cancelled: tuple[str, ...] = (), **degrees: Any) -> Any:
    """Run batches, with ``cancelled`` jobs cancelled before the first one; return results and rank 0's messages."""
    args = xFuserArgs(model=path, max_sequence_length=7, no_use_resolution_binning="pixart" in path, **degrees)
    engine_config, inputs = args.create_config()
    pipe = load_pipeline(engine_config, inputs)
    pipe.set_progress_bar_config(disable=True)
    teams = worker.teams_of(pipe, engine_config, inputs, False)
    ours, theirs = Pipe()
    if cancelled:
        ours.send(("cancel", set(cancelled)))
    ends = [worker.draw(teams, inputs, engine_config.world_size, batch, theirs) for batch in batches]
    sent = []
    while ours.poll():
        sent.append(ours.recv())
    teams[engine_config.world_size][1].unwrap()
    return ends, sent


@pytest.mark.parametrize("error", [DistBackendError("NCCL communicator was aborted"), ConnectionResetError()])
def test_a_rank_ends_when_no_call_can_follow(monkeypatch, error):
    def fails(*_):
        raise error

    monkeypatch.setattr(worker, "in_team", lambda groups: nullcontext())
    monkeypatch.setattr(worker, "arguments", fails)
    with pytest.raises(type(error)):
        worker.draw({1: (None, None)}, None, 1, [], None)


def latents(end: Any) -> list[torch.Tensor]:
    kind, results = end
    assert kind == "done", results
    return [safetensors.torch.load(result)["latents"] for result in results]


@pytest.mark.parametrize(
    "family, degrees",
    [
        ("pixart_sigma", {"use_cfg_parallel": True}),
        ("flux", {"data_parallel_degree": 2}),
        ("sd3", {"ulysses_degree": 2}),
    ],
)
def test_a_batch_is_what_its_jobs_are_alone(pool, folder_of, family, degrees):
    """Compare latents, with prompts of different lengths; each job also runs alone, before and after the batch."""
    jobs = [job(seed, prompt) for seed, prompt in enumerate(PROMPTS)]
    options = {"output_type": "latent"}
    (alone, _), *_ = pool.run(1, _draws_with, folder_of(family), [[one] for one in jobs], options)
    (together, _), *_ = pool.run(2, _draws_with, folder_of(family), [[jobs[0]], jobs, [jobs[0]]], options | degrees)
    expected = [latents(end)[0] for end in alone]
    first, batch, again = (latents(end) for end in together)
    for drawn, wanted in zip([*first, *batch, *again], [expected[0], *expected, expected[0]], strict=True):
        assert running.error(drawn.numpy(), wanted.numpy()) <= running.TOLERANCE


def _draws_with(path: str, batches: list[Any], options: dict[str, Any]) -> Any:
    return draws(path, batches, **options)


def _cancelled(path: str, batches: list[Any], degrees: dict[str, Any]) -> Any:
    return draws(path, batches, ("0",), **degrees)


@pytest.mark.parametrize("degrees", [{"pipefusion_parallel_degree": 2}, {"distrifusion_degree": 2}, {"ring_degree": 2}])
def test_behind_a_cancelled_batch_the_next_is_as_ever(pool, folder_of, degrees):
    batches = [[job(0)], [job(1)], [job(2, settings=SETTINGS | {"height": 81})], [job(1)]]
    for ends, sent in pool.run(2, _cancelled, folder_of("pixart_sigma"), batches, degrees)[:1]:
        kinds = [kind for kind, _ in ends]
        assert kinds == ["cancelled", "done", "invalid", "done"] and "divisible" in ends[2][1]
        assert ends[1][1] == ends[3][1]
        assert [step for _, (step, _) in sent] == [1, 2, 3] * 2
    (fresh, _), _ = pool.run(2, _draws_with, folder_of("pixart_sigma"), [[job(1)]], degrees)
    assert fresh == ends[1:2]


def test_a_picture_is_edited_and_previewed(pool, folder_of, tmp_path):
    """Flux' latents are packed, and jobs with an image start from it."""
    picture = whole.picture()
    picture.save(tmp_path / "own.png")
    file = io.BytesIO()
    picture.transpose(Image.Transpose.ROTATE_180).save(file, "PNG")
    batches = [[job(0, preview_every=1)], [job(0, image=file.getvalue())]]
    options = {"img_file_path": tmp_path / "own.png"}
    (serial, sent), *_ = pool.run(1, _draws_with, folder_of("flux"), batches, options)
    (parallel, _), *_ = pool.run(2, _draws_with, folder_of("flux"), batches, options | {"ring_degree": 2})
    pixels = [[_pixels(end[1][0]) for end in ends] for ends in (serial, parallel)]
    assert not np.array_equal(*pixels[0])
    for one, other in zip(*pixels, strict=True):
        assert np.abs(one - other).max() <= 1
    previews = [details["0"] for _, (_, details) in sent if "0" in details]
    assert previews and _pixels(previews[0]).shape == (80, 48, 3)


def _pixels(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)), dtype=np.int16)


def _elastic(path: str, calls: list[Any], degrees: dict[str, Any]) -> Any:
    """Run calls on this rank's team of the given size; return results, and the number of groups before and after."""
    options = {"max_sequence_length": 7, "no_use_resolution_binning": "pixart" in path, "output_type": "latent"}
    engine_config, inputs = xFuserArgs(model=path, **options, **degrees).create_config()
    elastic.check(engine_config)
    pipe = load_pipeline(engine_config, inputs)
    pipe.set_progress_bar_config(disable=True)
    teams, rank = worker.teams_of(pipe, engine_config, inputs, True), torch.distributed.get_rank()
    groups = len(torch.distributed.distributed_c10d._world.pg_map)
    ends = []
    for size, batches in calls:
        ends.append(worker.draw(teams, inputs, size, batches[rank // size], None))
    torch.distributed.barrier()
    return (
        ends,
        groups,
        len(torch.distributed.distributed_c10d._world.pg_map),
        list(teams) == elastic.sizes_of(engine_config.world_size, True),
    )


@pytest.mark.parametrize(
    "family, degrees",
    [
        ("sd3", {"use_cfg_parallel": True, "ulysses_degree": 2}),
        ("flux", {"ring_degree": 2, "data_parallel_degree": 2, "use_parallel_vae": True}),
    ],
)
def test_teams_of_any_size_draw_the_same_and_make_no_groups(pool, folder_of, family, degrees):
    """Four ranks run different jobs: one per rank, then two teams of two, then one job on all, then one per rank."""
    jobs = [job(seed, PROMPTS[seed % 3], negative_prompt="a") for seed in range(4)]
    alone = [[one] for one in jobs]
    (expected, _), *_ = pool.run(1, _draws_with, folder_of(family), alone, {"output_type": "latent"})
    expected = [latents(end)[0] for end in expected]
    calls = [(1, [[0], [1], [2], [3]]), (2, [[0], [1, 2, 3]]), (4, [[2]]), (1, [[3], [2], [1], [0]])]
    check_teams(pool, 4, folder_of(family), jobs, calls, expected, degrees)


def check_teams(pool, ranks, path, jobs, calls, expected, degrees):
    """Check the results of calls, each given as the ranks per team and the job numbers of each team."""
    batches = [(size, [[jobs[number] for number in team] for team in teams]) for size, teams in calls]
    for rank, (ends, before, behind, all_sizes) in enumerate(pool.run(ranks, _elastic, path, batches, degrees)):
        assert before == behind and all_sizes
        for end, (size, teams) in zip(ends, calls, strict=True):
            assert end[0] == "done"
            if rank % size == 0:
                for drawn, number in zip(latents(end), teams[rank // size], strict=True):
                    assert running.error(drawn.numpy(), expected[number].numpy()) <= running.TOLERANCE


@pytest.mark.matrix
def test_teams_of_any_size_draw_the_same_with_compiled_blocks(pool, folder_of):
    jobs, path = [job(seed) for seed in range(2)], folder_of("pixart_sigma")
    (alone, _), *_ = pool.run(1, _draws_with, path, [[one] for one in jobs], {"output_type": "latent"})
    expected, degrees = [latents(end)[0] for end in alone], {"ulysses_degree": 2, "use_torch_compile": True}
    check_teams(pool, 2, path, jobs, [(1, [[0], [1]]), (2, [[1]]), (1, [[1], [0]])], expected, degrees)
