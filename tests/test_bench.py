"""The bench: its counts, its output, and its refusals."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import running
import tiny
import torch
import torch.distributed as dist
from PIL import Image
from torch.distributed import _functional_collectives as functional

from xfuser.bench import command, plots, quality, quality_command
from xfuser.bench.configurations import configurations
from xfuser.bench.measure import measure
from xfuser.bench.workload import Workload, diffusers_own, ours
from xfuser.config import xFuserArgs
from xfuser.core.distributed import init_distributed_environment
from xfuser.core.meters import LiveMemory, traffic, waiting

ROOT = Path(__file__).parent.parent


def xdit(folder, *flags):
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    program = [sys.executable, "-m", "xfuser.cli", *map(str, flags)]
    return subprocess.run(program, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


@pytest.mark.matrix
def test_bench_reports_what_configurations_cost(tmp_path):
    """The expected counts are known; Diffusers has no context parallelism for PixArt to compare with."""
    degrees = ("ulysses", "ring", "pipefusion_parallel", "tensor_parallel", "distrifusion")
    configs = [*(f"{name}_degree=2" for name in degrees), "use_cfg_parallel"]
    flags = ("--case", "tiny", "--configs", *configs, "--rounds", "1")
    done = xdit(tmp_path, "bench", *flags, "--against", "diffusers", "--timeline", "time.png")
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "results/bench/bench.json").read_text())
    (run,) = told["runs"]
    rows = {row["name"]: row for row in run["rows"]}
    assert "cp_plan" in rows.pop("diffusers ulysses_degree=2")["refused"]
    assert run["shape"] == {"tokens": 128, "hidden": 32, "element": 4, "layers": 4} and told["machine"]["cores"]
    ulysses, ring, pipefusion, tensor, distrifusion, guidance = rows.values()
    stream, layers = 128 * 32 * 4, 4
    assert [sent["all_to_all_single"] for sent in ulysses["sent"]] == [stream * layers] * 2
    assert [sent["send"] for sent in ring["sent"]] == [stream * layers] * 2
    assert [sent["all_reduce"] for sent in tensor["sent"]] == [stream * layers * 3] * 2  # one for cross-attention
    assert pipefusion["sent"][0]["send"] == stream > pipefusion["sent"][1]["send"]
    assert all(sum(sent.values()) < stream for sent in guidance["sent"])
    whole = run["serial"]["parameters"][0]
    assert max(pipefusion["parameters"] + tensor["parameters"]) < 0.7 * whole == 0.7 * ulysses["parameters"][0]
    for row in (ulysses, ring, tensor, guidance):
        assert max(row["relative_error"]) <= 1e-5 and row["buffers"] == [0, 0] == run["serial"]["buffers"]
    assert min(max(row["relative_error"]) for row in (pipefusion, distrifusion)) > 1e-5
    keys_and_values = 2 * stream * layers
    assert keys_and_values == min(distrifusion["buffers"]) and keys_and_values // 2 <= min(pipefusion["buffers"])
    text = (tmp_path / "results/bench/bench.md").read_text()
    assert text.strip() in done.stdout and "| `ring_degree=2` | 2 |" in text and "2 · p·hs·L" in text
    pictures = [tmp_path / "time.png", tmp_path / "results/bench/bench.png"]
    assert all(Image.open(path).size[0] > 500 for path in pictures)
    assert sorted(os.listdir(tmp_path)) == ["results", "time.png"]


PREDICTS = """
import sys
from xfuser.bench import predict
from xfuser.bench.command import main
predict.MODELS = ("tiny",)  # instead of four models that take two minutes each
sys.exit(main(["--predict", "--rounds", "1", "--configs", "ulysses_degree=2", "distrifusion_degree=2"]))
"""


@pytest.mark.matrix
def test_this_machine_is_calibrated_and_predicted(tmp_path):
    environment = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "XFUSER_CACHE": str(tmp_path)}
    program, environment = [sys.executable, "-c", PREDICTS], os.environ | environment
    done = subprocess.run(program, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    (kept,) = (tmp_path / "machines").iterdir()
    machine = json.loads(kept.read_text())
    assert 1e9 < machine["peak"] < 1e13 and 1e8 < machine["bandwidth"] < 1e12 and 1e-7 < machine["exps"] < 1e3
    assert machine["synchronous"] and 1e-6 < machine["constants"]["start"] < 0.1
    rows = [line.split(" | ") for line in done.stdout.split("## Predicted")[1].splitlines() if line.startswith("| `")]
    assert [row[0] for row in rows] == ["| `serial`", "| `ulysses_degree=2`", "| `distrifusion_degree=2`"]
    assert all(float(cell.split()[0]) > 0 for row in rows for cell in row[1:3])
    assert [word for row in rows for word in row[4].split(", ") if word.strip()].count("named") == 1
    assert "links" in rows[1][5] and "links" not in rows[0][5] and "of 3 within 20 %" in done.stdout


@pytest.mark.matrix
def test_bench_tells_what_compiled_blocks_bring(tmp_path):
    flags = ("--compile", "--case", "tiny", "--configs", "ulysses_degree=2", "naive_patch_degree=2 split_scheme=col")
    done = xdit(tmp_path, "bench", *flags, "--rounds", "1")
    assert done.returncode == 0, done.stderr
    told = json.loads((tmp_path / "results/bench/compiled.json").read_text())
    ((ulysses, naive),) = [run["rows"] for run in told["runs"]]
    assert (ulysses["graphs"], ulysses["breaks"], ulysses["later"]) == (1, 0, 0) and ulysses["error"] <= 1e-5
    assert naive["error"] > 1e-5 and min(ulysses["cold"], naive["cold"]) > max(ulysses["calls"]["compiled"])
    text = (tmp_path / "results/bench/compiled.md").read_text()
    assert text.strip() in done.stdout and text.count("| `") == 2


def quality_on_a_rank(folder, flags):
    """Run ``xdit quality`` as torchrun starts it, on one rank."""
    os.environ |= {"RANK": "0", "WORLD_SIZE": "1"}
    os.chdir(folder)
    try:
        return quality_command.main(flags)
    finally:
        del os.environ["RANK"], os.environ["WORLD_SIZE"]
        os.chdir(ROOT)


def test_quality_compares_pictures_with_serial(tmp_path, pool):
    """The shipped pipeline equals serial under exact methods, is close under PipeFusion, and follows the prompt.

    The background is black, as the single-precision SSIM of equal bright flat areas is not 1 to four digits.
    """
    (tmp_path / "prompts.txt").write_text(
        "a red circle above a blue square on a black background\n\n two red squares on a black background \n"
    )
    torch.jit.script(Colours()).save(tmp_path / "features.pt")
    flags = ("--configs", "vae_chunk_rows=8 use_parallel_vae", "num_pipeline_patch=4", "--prompts", "prompts.txt")
    flags = [*flags, "--num_inference_steps", "8", "--features", "features.pt"]
    assert pool.run(1, quality_on_a_rank, tmp_path, flags) == [0]
    rows = json.loads((tmp_path / "results/quality/quality.json").read_text())["rows"]
    exact, stale = rows["vae_chunk_rows=8 use_parallel_vae"], rows["num_pipeline_patch=4"]
    assert min(exact["psnr"]) > 90 and min(exact["ssim"]) > 0.9999 and exact["fid"] < stale["fid"]
    assert all(25 < value < 70 for value in stale["psnr"]) and all(0.9 < value < 1 for value in stale["ssim"])
    assert all(row["adherence"] == 1 and len(row["paths"]) == 2 for row in rows.values())
    assert all(Image.open(tmp_path / path).size == (256, 256) for path in stale["paths"])
    assert "| `num_pipeline_patch=4` |" in (tmp_path / "results/quality/quality.md").read_text()
    assert Image.open(tmp_path / "results/quality/quality.png").size[0] > 300


class Colours(torch.nn.Module):
    """Replaces a feature network: returns the mean colours of quarters."""

    def forward(self, x):
        return torch.nn.functional.adaptive_avg_pool2d(x.float() / 255, 2).flatten(1)


def test_measures_of_pictures(tmp_path):
    torch.jit.script(Colours()).save(tmp_path / "features.pt")
    a = torch.rand(2, 3, 32, 32, generator=running.seeded())
    assert quality.psnr(a, a) == 120 and quality.psnr(a, a + 0.1) == pytest.approx(20)
    assert quality.psnr(2 * a, 2 * a + 0.1, peak=2) == pytest.approx(20 + 20 * torch.tensor(2.0).log10().item())
    assert quality.ssim(a, a) == pytest.approx(1) and quality.ssim(a, a.flip(-1)) < 0.5
    for folder, brightness in (("light", 1), ("same", 1), ("dark", 0.5)):
        for index in range(4):
            pixels = torch.rand(8, 8, 3, generator=torch.Generator().manual_seed(index)) * brightness * 255
            (tmp_path / folder).mkdir(exist_ok=True)
            Image.fromarray(pixels.byte().numpy()).save(tmp_path / folder / f"{index}.png")
    light, same, dark, features = (str(tmp_path / name) for name in ("light", "same", "dark", "features.pt"))
    assert abs(quality.fid(light, same, features)) < 1e-6 < quality.fid(light, dark, features)
    with pytest.raises(ValueError, match="has 0 images"):
        quality.fid(str(tmp_path), dark, features)
    with pytest.raises(ValueError, match="holds no network"):
        quality.fid(light, dark, str(tmp_path / "dark" / "0.png"))


def collectives():
    """Return the bytes that this rank sends, by operation, and whether waits were recorded."""
    x, world = torch.ones(12), dist.group.WORLD
    with traffic() as sent, waiting() as waits:
        dist.all_reduce(x)
        functional.all_reduce(x, "sum", world).sum()
        dist.broadcast(x, 0)
        dist.all_gather([torch.empty(12) for _ in range(2)], x)
        dist.gather(x, [torch.empty(12) for _ in range(2)] if dist.get_rank() == 0 else None)
        dist.reduce_scatter(torch.empty(6), [x[:6].clone(), x[6:].clone()])
        dist.all_to_all_single(torch.empty(12), x)
    return sent.sent, len(waits.waits) >= 7


def test_traffic_sees_every_collective(pool):
    both = {"all_reduce": 96, "all_gather": 48, "reduce_scatter": 24, "all_to_all_single": 24}
    (first, first_waited), (second, second_waited) = pool.run(2, collectives)
    assert first == both | {"broadcast": 48} and second == both | {"gather": 48}
    assert first_waited and second_waited


def test_live_memory_knows_what_outlives_an_epoch():
    with LiveMemory() as memory:
        kept = [torch.ones(5)]
        for memory.epoch in (0, 1):
            kept.append(torch.ones(10 * (memory.epoch + 1)))
            torch.ones(100)
        memory.free_of_epoch({"output": kept[1]})
    assert memory.by_epoch() == {1: 80} and memory.live == 20 + 40 + 80 and memory.peak >= memory.live + 400


def against_diffusers():
    """Run Flux with Ulysses of xfuser and of Diffusers."""
    init_distributed_environment()
    workload = Workload(xFuserArgs(), "tiny-joint")
    (ulysses,) = configurations(["ulysses_degree=2"], [2], xFuserArgs())
    return measure(workload, [ours(workload, ulysses), diffusers_own(workload, 2)], rounds=1, warm_up=0)


def test_diffusers_own_is_measured_alike(pool):
    for told in pool.run(2, against_diffusers):
        first, second = told["rows"]
        assert max(first["relative_error"] + second["relative_error"]) <= 1e-5
        assert all(row["seconds"] and len(row["waiting"][0]) == 2 for row in told["rows"])
        sizes = [sum(row["sent"][0].values()) for row in told["rows"]]
        assert 0.5 * sizes[0] <= sizes[1] <= 2 * sizes[0]


CONFIGS = [
    "tensor_parallel_degree=2",
    "ulysses_degree=2 text_encoder=rank0",
    "pipefusion_parallel_degree=2",
    "ring_degree=2",
]


def of_a_model(path):
    """Run a saved pipeline under configurations that alternately shard weights and do not."""
    init_distributed_environment()
    size = {"height": 80, "width": 48, "no_use_resolution_binning": True, "max_sequence_length": 7}
    args = xFuserArgs(model=path, prompt=["a cat"], num_inference_steps=2, **size)
    workload = Workload(args)
    contenders = [ours(workload, one) for one in configurations(CONFIGS, [2], args)]
    return measure(workload, contenders, rounds=2, warm_up=1)


def test_every_configuration_meets_the_whole_pipeline(pool, folder_of):
    for told in pool.run(2, of_a_model, folder_of("pixart_sigma")):
        assert told["serial"]["parameters"][0] == told["serial"]["parameters"][1]
        tensor, ulysses, pipefusion, ring = told["rows"]
        assert all(len(row["seconds"]) == 2 for row in told["rows"])
        assert all(max(row["relative_error"]) <= 1e-5 for row in (tensor, ulysses, ring))
        assert max(tensor["parameters"] + pipefusion["parameters"]) < told["serial"]["parameters"][0]


def names(texts, ranks=(2,), **base):
    return [one.name for one in configurations(texts, list(ranks), xFuserArgs(**base))]


def test_presets_follow_the_flags_of_the_library():
    """New degree flags appear in the presets automatically."""
    assert {"ulysses_degree=2", "ring_degree=2", "pipefusion_parallel_degree=2"} <= set(names(["methods"]))
    assert "use_cfg_parallel ring_degree=2" in names(None, (4,)) and "use_cfg_parallel" in names(None, (2,))
    assert not any("data_parallel" in name for name in names(None, (2, 4)))
    assert "data_parallel_degree=2" in names(["methods"], prompt=["a", "b"])
    assert not names(["guided"], do_classifier_free_guidance=False)
    assert names(["ring_degree={ranks}", "ring-degree 2"], (2, 4)) == [
        "ring_degree=2",
        "ring_degree=4",
        "ring-degree 2",
    ]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--configs", "fast"), "'fast'.*one of methods, guided"),
        (("--configs", "ulysses_degree=0"), "ulysses_degree=0"),
        (("--configs", "height=64"), "height is the same for all"),
        (("--ulysses_degree", "2"), "give it within --configs"),
        (("--case", "large"), "case='large' must be one of"),
        (("--case", "tiny", "--model", "x"), "without a model"),
        (("--rounds", "0"), "rounds=0"),
        (("--use_teacache",), "the serial run can have use_fbcache alone"),
        (("--use_fbcache", "--compile"), "the serial run can have use_fbcache alone"),
        (("--ranks", "1"), "nothing to compare"),
        (("--ranks", "0"), "ranks=0 must be a whole number of 1 or more"),
        (("--costs", "--vae_memory"), "--costs and --vae_memory are different measurements"),
        (("--vae_memory", "--case", "vae"), "case='vae' changes nothing about vae_memory"),
        (("--rates", "1gbit"), r"rates=\['1gbit'\] requires slow_links"),
        (("--model", "/nowhere"), "does not exist"),
        (("--output_dir", "/proc/nowhere"), "not a folder that can be written to"),
        (("--timeline", "/proc/nowhere/time.png"), "not a folder that can be written to"),
        (("--slow-links", "--rates", "fast"), "rate='fast'"),
        (("--slow-links", "--configs", "ring_degree=3"), r"run on \[3\] ranks"),
    ],
)
def test_bench_refuses_before_any_rank_starts(flags, message):
    with pytest.raises(ValueError, match=message):
        command.main(list(flags))


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompts", "/nowhere"), "prompts='/nowhere' cannot be read"),
        (("--model", tiny.__file__), "is not a Diffusers pipeline|nothing to draw"),
        (("--fid", "a", "b"), "features=None: FID needs the file"),
        (("--features", "/nowhere"), "docs/fid.md"),
        (("--configs", "slow"), "'slow'"),
        (("--ranks", "0"), "ranks=0 must be a whole number of 1 or more"),
    ],
)
def test_quality_refuses_before_any_rank_starts(flags, message):
    with pytest.raises(ValueError, match=message):
        quality_command.main(list(flags))


def test_packages_that_are_absent_are_named(monkeypatch):
    for module in ("matplotlib", "torchmetrics.functional.image"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ValueError, match=r'a plot needs matplotlib: pip install "xfuser\[bench\]"'):
        command.main(["--configs", "ulysses_degree=2"])
    with pytest.raises(ValueError, match="SSIM needs torchmetrics"):
        quality.ssim(torch.zeros(1, 3, 16, 16), torch.zeros(1, 3, 16, 16))


def test_links_are_drawn(tmp_path):
    runs = {rate: {"rows": [{"name": "ring_degree=2", "summary": {"speed_up": rate / 1e9}}]} for rate in (1e8, 1e9)}
    assert Image.open(plots.draw_links(str(tmp_path / "links.png"), "two nodes", runs)).size[0] > 500
