"""The predictions of xdit plan match actual runs, and models that cannot fit are refused before loading."""

import gc
import math
import shutil
from dataclasses import replace
from functools import cache, wraps

import accelerator
import numpy as np
import pytest
import running
import torch
from diffusers import SD3Transformer2DModel
from test_cli import xdit

from xfuser import xDiTParallel, xFuserArgs
from xfuser.cli.plan import machines_of, main, parser
from xfuser.config.args import in_bytes
from xfuser.config.config import legal_degrees
from xfuser.core.distributed import get_world_group
from xfuser.core.meters import LiveMemory
from xfuser.planner import auto, repeats
from xfuser.planner.machines import keep, machine_of, sheet_of
from xfuser.planner.rehearsal import alone_of, rehearse, weight_of
from xfuser.planner.report import left_out
from xfuser.planner.scale import choices_of, widened
from xfuser.planner.table import COLUMNS, Row, needs_of, plan, source_of
from xfuser.planner.trace import MATMUL, Message, Operator
from xfuser.weights.loading import load_pipeline


def asked(path, degrees, **changes):
    words = {"prompt": "a red circle", "height": 80, "width": 48, "num_inference_steps": 3, "dtype": "float32"}
    return xFuserArgs(model=path, **words | {"max_sequence_length": 6, "output_type": "latent"} | degrees | changes)


def taken(path, degrees):
    """Return the bytes of a rank's weights, and the high-water mark of its other tensors in a call."""
    parallel = xDiTParallel(running.loaded(path), *asked(path, degrees).create_config())
    parts = [part for part in parallel.components.values() if isinstance(part, torch.nn.Module)]
    weights, call = sum(map(weight_of, parts)), parallel.call_arguments()
    peaks = []
    for _ in range(2):  # messages freed late by threads, and uncollected cycles, may add to one run
        gc.collect()
        with LiveMemory() as meter:
            parallel(**call)
        peaks.append(meter.peak)
    parallel.unwrap()
    return weights, min(peaks)


@pytest.mark.parametrize(
    ("family", "ranks", "degrees"),
    [
        ("sd3", 1, {}),
        ("sd3", 2, {"use_cfg_parallel": True}),
        ("sd3", 2, {"ring_degree": 2}),
        ("sd3", 2, {"pipefusion_parallel_degree": 2}),
        ("sd3", 2, {"tensor_parallel_degree": 2}),
        ("sd3", 2, {"output_type": "pt", "use_parallel_vae": True, "ulysses_degree": 2}),
        ("flux", 4, {"ulysses_degree": 2, "pipefusion_parallel_degree": 2}),
        ("flux", 2, {"data_parallel_degree": 2, "prompt": ["a red circle", "the cat", "a green square"]}),
    ],
)
def test_what_is_foreseen_is_what_is_taken(pool, folder_of, family, ranks, degrees):
    """For the rank with the most memory: the peak of tensors, and weights, within 10 %."""
    path = folder_of(family)
    with alone_of(ranks):
        memory = rehearse(*asked(path, degrees).checked())
    real = pool.run(ranks, taken, path, degrees)
    assert sum(memory.weights.values()) == pytest.approx(max(weights for weights, _ in real), rel=0.1)
    assert max(memory.live.values()) == pytest.approx(max(peak for _, peak in real), rel=0.1)


def held(path, degrees):
    parallel = xDiTParallel(running.loaded(path), *asked(path, degrees).create_config())
    shares = {}
    for name, part in parallel.components.items():
        if isinstance(part, torch.nn.Module):
            local = [x.to_local() if hasattr(x, "to_local") else x for x in part.parameters()]
            shares[name] = sum(x.nbytes for x in local) + sum(x.nbytes for x in part.buffers())
    parallel.unwrap()
    return shares


def test_shares_of_weights_are_reckoned(pool, folder_of):
    path, mode = folder_of("sd3"), {"text_encoder": "shard", "fully_shard_degree": 2}
    with alone_of(2):
        memory = rehearse(*asked(path, {"ulysses_degree": 2}).checked())
    told = needs_of(memory, "shard", 2, 2)
    real = pool.run(2, held, path, mode | {"ulysses_degree": 2})[0]
    assert told["transformer"] == pytest.approx(real["transformer"], rel=0.1)
    encoders = sum(share for name, share in real.items() if name.startswith("text_encoder"))
    assert told["text encoders"] == pytest.approx(encoders, rel=0.1)


def test_the_table_has_every_combination_and_why_some_cannot_be(folder_of, capsys):
    path = folder_of("dit")
    call = ["--prompt", "1", "--dtype", "fp32", "--no_do_classifier_free_guidance"]
    rows = plan(xFuserArgs.from_cli_args(_parsed(path, call)), 2)
    assert len(rows) == len(legal_degrees(2))
    refused = [row.name for row in rows if row.refusal]
    assert refused == ["cfg 2"] and all(row.needs.keys() == set(COLUMNS) for row in rows if not row.refusal)
    peak = max(row.needs["peak"] for row in rows if not row.refusal)
    assert all(row.fits(peak) and "weights" not in row.text(peak) for row in rows if not row.refusal)
    assert main(["--model", path, "--world_size", "2", *call, "--memory", "1KB"]) == 1
    assert capsys.readouterr().out.count("no: the weights alone are above") == len(rows) - 1


def _parsed(path, flags):
    return parser().parse_args(["--model", path, "--world_size", "2", *flags])


def test_xdit_plan_is_a_command(tmp_path):
    done = xdit(tmp_path, "plan", "--world-size", "1", "--prompt", "a red circle")  # the shipped pipeline
    assert done.returncode == 0 and "all degrees 1" in done.stdout and done.stderr == "", done.stderr
    with pytest.raises(ValueError, match="world_size=0 must be 1 or more"):
        main(["--world-size", "0"])


def too_much(path, degrees, memory):
    try:
        load_pipeline(asked(path, degrees, memory=memory).create_config()[0])
    except ValueError as error:
        return str(error)
    return "loaded"


def test_what_cannot_fit_is_not_loaded(pool, folder_of):
    """All ranks report weights that do not fit; with more stages, they fit."""
    path = folder_of("sd3")
    weights = sum(map(weight_of, (x for x in running.loaded(path).components.values() if hasattr(x, "parameters"))))
    memory = f"{0.95 * weights / 1e3:.3f}KB"
    told = pool.run(2, too_much, path, {"ulysses_degree": 2}, memory)
    assert all("that a rank keeps are" in text and "xdit plan" in text for text in told)
    assert pool.run(2, too_much, path, {"pipefusion_parallel_degree": 2}, memory) == ["loaded"] * 2


def test_sizes():
    assert [in_bytes(size) for size in ("24GB", "1.5 KiB", "3m")] == [24 * 10**9, 1536, 3 * 10**6]
    with pytest.raises(ValueError, match="'much' is not a size"):
        in_bytes("much")


FLUX = xFuserArgs(model="flux.1-dev", prompt="a", dtype="bf16", num_inference_steps=28)
source = cache(lambda: source_of(FLUX))  # shared by rehearsals


def published_row(machine, compiled, **degrees):
    (row,) = plan(FLUX, math.prod(degrees.values()), machine_of(machine), compiled, [degrees], source())
    return row


def test_a_published_model_is_counted_without_a_download():
    """The matrix products of Flux.1-dev at 1024 pixels, 59,523 GFLOP in Diffusers' benchmark, and its weights."""
    told = published_row("H100", True).told
    flops = sum(_flops(told.steps[0, 0], MATMUL))
    assert flops == pytest.approx(59523e9, rel=1e-3)
    assert told.weights["transformer"] == pytest.approx(2 * 11.9e9, rel=0.01)


def _flops(events, kind):
    for event in events:
        if type(event) is tuple:
            yield from (event[1] * flops for flops in _flops(event[0], kind))
        elif isinstance(event, Operator) and event.kind == kind:
            yield event.flops


def test_ranks_with_a_branch_of_guidance_compute_half():
    """The first step of a pipeline that calls its transformer per branch is the exception: it runs both branches."""
    args = replace(FLUX, model="wan2.1-t2v-1.3b", height=160, width=96, num_frames=9)
    shared = source_of(args)
    told = [plan(args, ranks, None, False, [{"cfg": ranks}], shared)[0].told for ranks in (1, 2)]
    one, half = (sum(_flops(told.steps[max(told.steps)], MATMUL)) for told in told)
    assert half == pytest.approx(one / 2, rel=1e-3)


def test_weights_in_shards_travel_once_a_forward():
    """Fast links hide them behind compute; over slow links, steps wait for them. Each rank holds its shard."""
    args = replace(FLUX, model="wan2.1-t2v-1.3b", height=160, width=96, num_frames=9)
    shared, rows = source_of(args), []
    for link, degree in (("nvlink", 1), ("nvlink", 2), ("1gbit", 2)):
        sharded = replace(args, fully_shard_degree=degree)
        rows += plan(sharded, 2, machine_of("H100", link), False, [{"ulysses": 2}], shared)
    whole, fast, slow = rows
    assert fast.seconds == pytest.approx(whole.seconds)
    assert slow.time.step > 2 * fast.time.step
    weights = whole.told.weights["transformer"]
    rate = 0.125e9 * machine_of("H100").constants.link
    assert slow.time.step == pytest.approx(2 * weights / 2 / rate, rel=0.1)  # two calls, half of them
    assert fast.needs["transformer"] == pytest.approx(weights / 2, rel=0.05)
    for row in rows:
        assert sum(row.time.spent.values()) == pytest.approx(row.seconds, rel=0.02)


def test_divided_text_encoders_are_counted(folder_of):
    """Rows that shard weights count them; the others are refused, as in a run."""
    args = xFuserArgs(model=folder_of("sd3"), prompt="a", height=64, width=64, num_inference_steps=1)
    choices = [{"tensor": 2}, {"ulysses": 2}]
    whole, _ = plan(args, 2, choices=choices)
    divided, refused = plan(replace(args, tensor_parallel_text_encoder=True), 2, choices=choices)
    assert divided.needs["text encoders"] < 0.9 * whole.needs["text encoders"]
    assert refused.refusal.startswith("tensor_parallel_text_encoder requires")


def test_stages_of_two_transformers_are_counted():
    """Wan 2.2: half of the blocks of both; the KV of one at a time, and no KV while the VAE decodes."""
    args = replace(FLUX, model="wan2.2-t2v-a14b", height=160, width=96, num_frames=33)
    told = plan(args, 2, None, False, [{"pipefusion": 2}], source_of(args))[0].told
    assert [told.weights[name] for name in ("transformer", "transformer_2")] == pytest.approx([14.3e9] * 2, rel=0.05)
    keys_and_values = 2 * 20 * 2 * (9 * 60 + 512) * 5120 * 2  # two calls, 20 blocks, image and text, in two bytes
    assert told.kept == pytest.approx(keys_and_values, rel=0.1)
    assert told.live["vae"] < 0.6 * keys_and_values


def test_a_model_with_whole_text_and_a_schedule_of_two_steps_is_counted():
    """Mochi: its blocks take the whole text with every patch, and compute it only with the first one."""
    args = replace(FLUX, model="mochi-1-preview", height=160, width=96, num_frames=7)
    ring, staged = plan(args, 2, None, False, [{"ring": 2}, {"pipefusion": 2}], source_of(args))
    assert {step for step, _ in ring.told.steps} == {0, 1}
    first, second = (sum(_flops(staged.told.steps[1, patch], MATMUL)) for patch in (0, 1))
    assert second < 0.5 * first  # 256 tokens of text, and 60 of the image


def test_repeated_blocks_are_what_running_them_gives(folder_of, monkeypatch):
    """For a transformer with many blocks, counts of FLOPs and memory are the same as when all blocks run."""
    args = asked(folder_of("flux"), {"pipefusion_parallel_degree": 2}, num_inference_steps=3)
    told = []
    for ends in (1, 100):
        monkeypatch.setattr(repeats, "ENDS", ends)
        with alone_of(2):
            told.append(rehearse(*args.checked()))
    few, all_of_them = told
    for key, events in all_of_them.steps.items():
        assert sum(_flops(few.steps[key], MATMUL)) == sum(_flops(events, MATMUL))
    assert few.live == all_of_them.live and few.kept == all_of_them.kept


@pytest.mark.matrix
def test_times_follow_from_the_machine():
    """More ranks are faster, slow links are slower, a compiled step is not slower; the parts sum to the total."""
    one, fast = published_row("H100", True), published_row("H100", True, ulysses=4)
    eager, slow = published_row("H100", False, ulysses=4), published_row("L20", True, ulysses=4)
    staged = published_row("H100", True, pipefusion=2)
    assert fast.seconds < one.seconds and fast.seconds < eager.seconds
    assert slow.time.spent["links"] > fast.time.spent["links"]
    for row in (one, fast, eager, slow, staged):
        assert sum(row.time.spent.values()) == pytest.approx(row.seconds, rel=0.02), row.name
    assert fast.exact and not staged.exact and staged.time.spent["bubbles"] > 0


@pytest.mark.parametrize("spelling", ["--node_link", "--node-link"])
def test_nodes_have_links_of_their_own(spelling):
    options = parser().parse_args(["--gpus", "8xL40", "--links", "pcie", "--nodes", "2", spelling, "200gbit"])
    ranks, machine = machines_of(options)
    assert (ranks, machine.node, machine.node_link) == (16, 8, 25e9)
    message = Message(1, "send", (0, 1), 10**9)
    assert machine.link_seconds(message._replace(ranks=(7, 8))) > machine.link_seconds(message)


def test_many_ranks_are_reached():
    """There are a few choices for a thousand ranks, also by widening the best choices for fewer ranks."""
    assert all(math.prod(one.values()) == 1024 for one in choices_of(1024)) and 0 < len(choices_of(1024)) < 8
    best = Row("", {}, "", {"cfg": 1, "dp": 1, "pipefusion": 1, "ulysses": 32, "ring": 8, "tensor": 1})
    staged = replace(best, degrees=best.degrees | {"pipefusion": 2, "ring": 4})
    wider = widened([staged, best], 512)
    assert wider == [best.degrees | {"cfg": 2}, best.degrees | {"ring": 16}]
    assert widened([staged], 512) == [] and len(widened([replace(best, degrees={"ring": 2, "cfg": 1})], 4)) == 2


def test_reasons_are_told_once():
    rest = [(Row(name, {}), reason) for name, reason in (("ring 2", "slow"), ("cfg 2", "none"), ("ring 4", "slow"))]
    assert left_out(rest) == ["no: slow: ring 2, ring 4", "no: none: cfg 2"]


def test_replicas_without_images_and_stale_rows_are_not_counted():
    degrees = [{"dp": 2}, {"pipefusion": 2}, {"cfg": 2}]
    rows = plan(FLUX, 2, machine_of("H100"), False, degrees, source(), exact=True)
    assert [row.refusal.partition(":")[0] for row in rows] == ["data_parallel_degree", "not exact", "use_cfg_parallel"]


def test_unknown_machines_and_bad_flags_are_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("XFUSER_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"(?s)gpus='Voodoo2' is unknown.*H100.*--calibrate"):
        machine_of("Voodoo2")
    for flags, words in (
        (["--gpus", "0xH100"], "a number and a name"),
        (["--gpus", "2xH100", "--links", "string"], "is not a rate"),
        (["--gpus", "2xH100", "--objective", "beauty"], "objective='beauty' is unknown"),
        (["--gpus", "2xH100", "--picture", "/proc/self/x/y.png"], "is not a folder that can be written"),
        (["--gpus", "2xH100", "--picture", str(tmp_path)], "is a folder: give a file"),
        (["--gpus", "2xH100", "--links", "0gbit"], "is not a rate"),
        (["--gpus", "2xH100", "--world_size", "2"], "world_size=2 and gpus both"),
        (["--gpus", "2xH100", "--ring_degree", "2"], "ring_degree=2 chooses degrees"),
        (["--gpus", "2xH100", "--use_cfg_parallel"], "use_cfg_parallel=True chooses degrees"),
        (["--gpus", "2xH100", "--use_split_batch"], "use_split_batch=True chooses degrees"),
        (["--gpus", "2xH100", "--auto"], "auto=True chooses degrees"),
        (
            ["--gpus", "2xH100", "--scale", "1", "2", "--explain", "best"],
            "explain='best' is not supported with --scale",
        ),
        (["--gpus", "2xH100", "--node_link", "100gbit"], "node_link='100gbit' requires several nodes"),
        (["--gpus", "2xH100", "--explain", "ring 3"], "explain='ring 3' is unknown"),
        (["--gpus", "37xH100"], "37 ranks: Ulysses and ring, up to 32 each, and CFG do not multiply"),
        (["--gpus", "H100", "--scale", "1", "37"], "37 ranks: Ulysses and ring"),
        (["--gpus", "H100x4"], "gpus='H100x4': give a number and a name, such as 8xL40"),
        (["--world_size", "2", "--exact"], "exact=True requires --gpus"),
        (["--calibrate"], "changes nothing about a calibration"),
        ([], "--gpus"),
    ):
        with pytest.raises(ValueError, match=words):
            main(["--model", "flux.1-dev", *flags])
    with pytest.raises(ValueError, match=r"(?s)model='sd3' is neither a folder nor .*stable-diffusion-3-medium"):
        main(["--model", "sd3", "--gpus", "2xH100"])
    keep(replace(machine_of("CPU"), name="My Machine"))
    assert machine_of("my machine").synchronous


def test_a_plan_of_which_every_row_is_refused_fails(folder_of, tmp_path, capsys):
    flags = ["--world_size", "1", "--no_use_resolution_binning"]
    assert main(["--model", folder_of("pixart_sigma"), "--num_frames", "5", *flags]) == 1
    assert "takes no num_frames" in capsys.readouterr().out
    with pytest.raises(ValueError, match="'/nowhere' does not exist"):
        main(["--model", "/nowhere", *flags])
    copy = shutil.copytree(folder_of("pixart_sigma"), tmp_path / "copy")
    (copy / "vae" / "trainer_state.json").write_text("{")  # not of the pipeline
    assert main(["--model", str(copy), *flags]) == 0
    for part in ("vae", "scheduler"):  # the first is built without weights, the second loaded
        shutil.move(copy / part, tmp_path / part)
        assert main(["--model", str(copy), *flags]) == 1
        assert f"no: {copy} has no folder {part}" in capsys.readouterr().out
        shutil.move(tmp_path / part, copy / part)


def test_a_row_says_why_it_cannot_be_counted(folder_of, monkeypatch):
    """One forward reads values; another one fails for other reasons, only on two ranks."""
    forward, args = SD3Transformer2DModel.forward, asked(folder_of("sd3"), {})

    @wraps(forward)
    def looking(self, hidden_states, *args, **kwargs):
        if get_world_group().world_size > 1:
            raise KeyError("one of its own")
        return forward(self, hidden_states * hidden_states.sum().item(), *args, **kwargs)

    monkeypatch.setattr(SD3Transformer2DModel, "forward", looking)
    (alone,) = plan(args, 1, machine_of("H100"), False, [{}])
    assert "looks at the values" in alone.refusal and "_local_scalar_dense" in alone.refusal
    (two,) = plan(args, 2, machine_of("H100"), False, [{"ulysses": 2}])
    assert two.refusal == "KeyError: 'one of its own'"


@pytest.mark.parametrize(
    ("told", "sheet"),
    [
        ("NVIDIA H100 80GB HBM3", "H100"), ("H100SXM", "H100"), ("NVIDIA H100 PCIe", "H100 PCIe"),
        ("H200 141GB", "H200"), ("NVIDIA H200 NVL", "H200 NVL"), ("NVIDIA H800 PCIe", "H800 PCIe"),
        ("NVIDIA GH200 480GB", "GH200"), ("GB200", "GB200"), ("NVIDIA H20-3e", "H20-3e"), ("h20", "H20"),
        ("NVIDIA A100-SXM4-80GB", "A100"), ("A100-PCIE-40GB", "A100 PCIe 40GB"), ("NVIDIA A100 80GB PCIe", "A100 PCIe"),
        ("NVIDIA A10G", "A10G"), ("A10", "A10"), ("L40-48GB", "L40"), ("NVIDIA L40S", "L40S"), ("L20X", None),
        ("NVIDIA GeForce RTX 4090", "RTX 4090"), ("NVIDIA GeForce RTX 4090 D", "RTX 4090D"), ("rtx4090d", "RTX 4090D"),
        ("4090", "RTX 4090"), ("NVIDIA RTX A6000", "RTX A6000"), ("NVIDIA RTX A4000", None), ("Quadro RTX 6000", None),
        ("NVIDIA RTX 6000 Ada Generation", "RTX 6000 Ada"), ("Tesla V100-SXM2-16GB", "V100 16GB"), ("Tesla T4", "T4"),
        ("AMD Instinct MI300X", "MI300X"), ("A1000", None),
    ],
)  # fmt: skip
def test_a_machine_is_known_by_the_name_that_its_driver_tells(told, sheet):
    assert sheet_of(told) == sheet


@pytest.mark.covering
@pytest.mark.parametrize(
    ("name", "mebibytes"),
    [
        ("L40S", 46068),
        ("A10", 23028),
        ("L4", 23034),
        ("T4", 15360),
        ("H100", 81559),
        ("B200", 183359),
        ("B300", 275040),
    ],
)
def test_a_data_sheet_has_no_more_memory_than_the_driver_tells(name, mebibytes):
    assert machine_of(name).memory / 2**20 == pytest.approx(mebibytes, rel=6e-3)


@pytest.mark.matrix
def test_the_ranking_explains_itself(folder_of, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XFUSER_CACHE", str(tmp_path))
    flags = ["--model", folder_of("sd3"), "--height", "80", "--width", "48", "--max_sequence_length", "6"]
    assert main([*flags, "--gpus", "2xCPU", "--dtype", "fp32", "--exact", "--explain", "best"]) == 0
    out = capsys.readouterr().out
    assert "no: not exact: its images differ a little: pipefusion 2" in out and "  best" in out and "GFLOP" not in out
    assert "counted in a step" in out and (tmp_path / "plan.png").stat().st_size > 1000
    assert main([*flags, "--gpus", "CPU", "--dtype", "fp32", "--scale", "1", "2"]) == 0
    assert "efficiency" in capsys.readouterr().out


def chosen_on(path, flags):
    engine, inputs = asked(path, {"auto": True} | flags).create_config()
    return engine.parallel_config.degrees(), inputs.use_cfg_parallel


def test_auto_chooses_alike_on_all_ranks(pool, folder_of):
    one, other = pool.run(
        2, chosen_on, folder_of("sd3"), {"fully_shard_degree": np.int64(2), "num_inference_steps": None}
    )
    assert one == other and math.prod(one[0].values()) == 2 and one[0]["pipefusion_parallel_degree"] == 1
    with pytest.raises(ValueError, match="auto chooses the degrees"):
        asked("x", {"auto": True, "ring_degree": 2}).checked()
    with pytest.raises(ValueError, match="fully_shard_degree=0 must be 1"):
        source_of(replace(FLUX, fully_shard_degree=0))
    with pytest.raises(ValueError, match="allow_stale requires auto"):
        asked("x", {"allow_stale": True}).checked()


@pytest.mark.parametrize("node", [1, 2])
def test_auto_plans_for_the_devices_and_nodes_that_are_here(monkeypatch, node):
    """A data sheet has 80 GiB, and nodes of eight; here a device has 2 GiB, and torchrun says how large nodes are."""
    accelerator.install(monkeypatch)
    monkeypatch.setattr(accelerator, "NAME", "NVIDIA H100 80GB HBM3")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(node))
    monkeypatch.setenv("XFUSER_CACHE", "/nowhere")
    asked, needs = [], dict.fromkeys(COLUMNS, 0)
    large, small = (Row(name, needs | {"peak": peak}) for name, peak in (("large", 3 << 30), ("small", 1 << 30)))
    monkeypatch.setattr(auto, "plan", lambda *given, **_: asked.append(given[2]) or [large, small])
    assert auto.choice(FLUX, 2)["reason"].startswith("small, ")
    assert asked[0].name == "H100" and asked[0].node == node
