"""Whole programs as a user starts them: xdit, the examples under torchrun, and their failures.

Starting processes that import torch and Diffusers takes seconds, so most programs run in the ranks of the pool.
"""

import io
import json
import os
import runpy
import subprocess
import sys
import time
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

import imageio
import pytest
import torch.distributed as dist
import unets
import whole
from PIL import Image

from xfuser.cli import main as cli

ROOT = Path(__file__).parent.parent
EXAMPLES = {
    "pixartalpha_example.py": ("pixart_alpha", ["--use_cfg_parallel"]),
    "pixartsigma_example.py": ("pixart_sigma", ["--ulysses_degree", "2"]),
    "sd3_example.py": ("sd3", ["--ring_degree", "2"]),
    "flux_example.py": ("flux", ["--ulysses_degree", "2", "--attention_backend", "flash"]),
    "hunyuandit_example.py": ("hunyuan_dit", ["--data-parallel-degree", "2"]),
    "dit_example.py": ("dit", ["--use_split_batch"]),
    "sdxl_example.py": ("sdxl", ["--distrifusion_degree", "2", "--use_parallel_vae"]),
}


def start(command, folder, **variables):
    environment = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"} | variables
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=120)


def xdit(folder, *flags):
    return start([sys.executable, "-m", "xfuser.cli", *map(str, flags)], folder)


def torchrun(folder, ranks, script, *flags):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={ranks}"]
    return start([*launcher, str(script), *map(str, flags)], folder)


@contextmanager
def program(folder, *arguments):
    """Within the context, set a program's folder and arguments, and RANK as a launcher does, and capture its output."""
    with pytest.MonkeyPatch.context() as patch, redirect_stdout(io.StringIO()) as told:
        patch.chdir(folder)
        patch.setattr(sys, "argv", list(map(str, arguments)))
        patch.setenv("RANK", str(dist.get_rank()))
        yield told


def xdit_in_rank(folder, *flags):
    with program(folder, "xdit", *flags) as told:
        assert cli.main() == 0
    return told.getvalue()


def xdit_without_encoder(folder, *flags):
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "imageio_ffmpeg", None)
        patch.delitem(sys.modules, "imageio.plugins.ffmpeg", raising=False)
        patch.delattr(imageio.plugins, "ffmpeg", raising=False)
        return xdit_in_rank(folder, *flags)


def example_in_rank(folder, name, *flags):
    with program(folder, name, *flags) as told:
        runpy.run_path(str(ROOT / "examples" / name), run_name="__main__")
    return told.getvalue()


SMALL = ("--height", "80", "--width", "48", "--num_inference_steps", "2", "--no_use_resolution_binning")


def test_xdit_draws_the_same_on_one_rank_two_and_four(pool, tmp_path, folder_of):
    common = ("--model", folder_of("pixart_sigma"), "--prompt", "a red circle", "the cat", *SMALL)
    pool.run(1, xdit_in_rank, tmp_path, *common)
    two = xdit(tmp_path, *common, "--data_parallel_degree", "2", "--output_dir", "two")
    assert two.returncode == 0, two.stderr
    degrees = ("--ulysses_degree", "2", "--data_parallel_degree", "2", "--output_dir", "four")
    four, *others = pool.run(4, xdit_in_rank, tmp_path, *common, *degrees)
    assert set(others) == {""}
    serial = sorted(tmp_path.glob("results/*.png"))
    for ranks, told in {"two": two.stdout, "four": four}.items():
        parallel = sorted(tmp_path.glob(f"{ranks}/*.png"))
        assert [path.name[-6:] for path in parallel] == ["_0.png", "_1.png"]
        assert f"on {2 if ranks == 'two' else 4} ranks (cpu), peak memory" in told
        for ours, reference in zip(parallel, serial, strict=True):
            assert str(ours.relative_to(tmp_path)) in told
            pixels = [list(Image.open(path).convert("RGB").tobytes()) for path in (ours, reference)]
            assert max(abs(a - b) for a, b in zip(*pixels, strict=True)) <= 1  # rounding to 8 bits


def test_xdit_draws_a_preview_of_what_two_stages_draw(pool, tmp_path):
    """PipeFusion on the shipped pipeline: four patches give the same image on one rank and on two."""
    common = ("--prompt", "a red circle above a blue square", "--num_inference_steps", "4", "--num_pipeline_patch", "4")
    pool.run(1, xdit_in_rank, tmp_path, *common, "--output_dir", "one")
    pool.run(2, xdit_in_rank, tmp_path, *common, "--output_dir", "two", "--pipefusion_parallel_degree", "2")
    preview, staged = (next(tmp_path.glob(f"{name}/*_patch4_0.png")) for name in ("one", "two"))
    assert Image.open(preview).tobytes() == Image.open(staged).tobytes()


VIDEO = (
    "--prompt",
    "a red circle",
    "--num_frames",
    "9",
    "--height",
    "160",
    "--width",
    "96",
    "--num_inference_steps",
    "2",
)


def test_xdit_saves_a_video(pool, tmp_path):
    """On two ranks: as MP4, or as a GIF with the same number of frames if the encoder is not installed."""
    common = ("--model", whole.save("ltx", tmp_path), *VIDEO)
    degrees = ("--ulysses_degree", "2", "--use_parallel_vae", "--output_dir", "two")
    told, _ = pool.run(2, xdit_in_rank, tmp_path, *common, *degrees)
    pool.run(1, xdit_without_encoder, tmp_path, *common)
    (film,) = (tmp_path / "two").iterdir()
    assert str(film.relative_to(tmp_path)) in told
    assert film.suffix == ".mp4" and imageio.get_reader(film).count_frames() == 9
    (animation,) = (tmp_path / "results").iterdir()
    assert animation.suffix == ".gif" and Image.open(animation).n_frames == 9


def test_xdit_makes_a_video_of_a_picture(pool, tmp_path):
    Image.new("RGB", (96, 160), (255, 0, 0)).save(tmp_path / "red.png")
    flags = ("--model", whole.save("ltx_i2v", tmp_path), *VIDEO, "--img_file_path", "red.png", "--use_cfg_parallel")
    pool.run(2, xdit_in_rank, tmp_path, *flags)
    (film,) = (tmp_path / "results").iterdir()
    assert film.stat().st_size > 0 and film.suffix == ".mp4"


@pytest.mark.parametrize("example", EXAMPLES)
def test_example(pool, tmp_path, folder_of, example):
    family, flags = EXAMPLES[example]
    size = ("--num_inference_steps", "2") if family == "dit" else SMALL[:-1]
    binning = () if family in ("dit", "sd3", "flux", "sdxl") else SMALL[-1:]
    prompt = ("--prompt", "1" if family == "dit" else "a red circle", "--max_sequence_length", "7")
    prompt = prompt[:2] if family in ("dit", "hunyuan_dit", "sd3", "sdxl") else prompt
    model = ("--model", unets.save(family, tmp_path) if family in unets.PIPELINES else folder_of(family))
    told = pool.run(2, example_in_rank, tmp_path, example, *model, *prompt, *size, *binning, *flags)
    written = [tmp_path / line for line in "".join(told).split()]
    assert written and all(path.is_file() and path.name.startswith(family) for path in written)


def test_every_example_is_tested():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


def edited(folder_of, tmp_path, changes):
    """Return a pipeline folder with a changed model_index.json."""
    folder = tmp_path / "model"
    folder.mkdir()
    index = json.loads(Path(folder_of("pixart_sigma"), "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | changes))
    return folder


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--prompt", "x", "--output_type", "jpeg"), "'jpeg' is unknown"),
        (("--prompt", "x", "--height", "tall"), "invalid int value: 'tall'"),
        (("--prompt", "x", "--vae_chunk_rows", "4"), "requires use_parallel_vae"),
        (("--prompt", "x", "--ulysses_degree", "0"), "ulysses_degree=0"),
        (("--prompt", "a", "--ulysses_degree", "999"), "999 ranks on one machine: at most 64 are supported"),
        (("--prompt", "x", "--model", "/nowhere"), "'/nowhere' does not exist"),
        (("--prompt", "x", "--model", "."), "has no model_index.json"),
    ],
)
def test_xdit_refuses_bad_input_once(tmp_path, monkeypatch, capsys, flags, message):
    told = refused(tmp_path, monkeypatch, capsys, *flags)
    assert told.count("ValueError") == 1 and message in told
    assert not list(tmp_path.iterdir())


def refused(folder, monkeypatch, capsys, *flags):
    """Run ``xdit`` in this process, and return its error; it must fail."""
    monkeypatch.chdir(folder)
    monkeypatch.setattr(sys, "argv", ["xdit", *map(str, flags)])
    assert cli.main() == 1
    return capsys.readouterr().err


def test_a_refusal_is_the_exit_code(tmp_path):
    done = xdit(tmp_path, "--ulysses_degree", "2")
    assert done.returncode == 1 and done.stderr.count("ValueError") == 1 and "nothing to draw" in done.stderr
    assert not list(tmp_path.iterdir())


def test_xdit_refuses_unknown_transformers_and_unets_before_loading(tmp_path, folder_of, monkeypatch, capsys):
    unet = edited(folder_of, tmp_path, {"transformer": [None, None], "unet": ["diffusers", "UNet2DModel"]})
    told = refused(tmp_path, monkeypatch, capsys, "--prompt", "x", "--model", unet, "--ulysses_degree", "2")
    assert told.count("ValueError") == 1
    assert "no plan for UNet2DModel" in told and "PixArtTransformer2DModel" in told


def test_ranks_fail_with_one_message(tmp_path, folder_of):
    """Bad input under torchrun: only rank 0 prints the error."""
    flags = ("--model", folder_of("pixart_sigma"), "--prompt", "x", "--ulysses_degree", "3")
    done = torchrun(tmp_path, 2, ROOT / "examples/pixartsigma_example.py", *flags)
    assert done.returncode == 1 and done.stderr.count("\nValueError: ") == 1, done.stderr
    assert "With 2 ranks you can choose" in done.stderr
    assert not list(tmp_path.iterdir())


def example_fails(*arguments):
    with pytest.raises(ValueError) as error:
        example_in_rank(*arguments)
    return str(error.value)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "/nowhere"), "does not exist"),
        (("--img_file_path", "missing.png"), "has no image-to-image variant"),
    ],
)
def test_ranks_refuse_what_cannot_be_loaded(pool, tmp_path, folder_of, flags, message):
    model = () if "--model" in flags else ("--model", folder_of("pixart_sigma"))
    asked = (*model, "--prompt", "x", "--ulysses_degree", "2", *flags)
    for told in pool.run(2, example_fails, tmp_path, "pixartsigma_example.py", *asked):
        assert message in told
    assert not list(tmp_path.iterdir())


FAILING = """
import sys, time, torch
from diffusers import DiffusionPipeline
from xfuser import xDiTParallel, xFuserArgs
from xfuser.core.distributed import get_world_group

pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe = xDiTParallel(pipe, *xFuserArgs({degree}=2).create_config())

def fail(pipe, step, timestep, values):
    if step == 1 and get_world_group().rank == int(sys.argv[2]):
        print("failing at", time.time(), flush=True)
        raise {error}("this rank fails")
    return values

pipe("x", height=80, width=48, callback_on_step_end=fail, num_inference_steps=500)
"""


@pytest.mark.parametrize(
    ("degree", "rank", "error"),
    [
        pytest.param("ulysses_degree", 1, "ValueError", marks=pytest.mark.matrix),
        ("pipefusion_parallel_degree", 0, "RuntimeError"),
        pytest.param("pipefusion_parallel_degree", 1, "RuntimeError", marks=pytest.mark.matrix),
    ],
)
def test_a_failing_rank_ends_all_within_seconds(tmp_path, folder_of, degree, rank, error):
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(degree=degree, error=error))
    done = torchrun(tmp_path, 2, script, folder_of("sd3"), rank)
    assert done.returncode == 1 and time.time() - float(done.stdout.split()[-1]) < 10, done.stderr
    first = next(line for line in done.stderr.splitlines() if "Error: " in line)
    assert first == f"{error}: this rank fails", done.stderr
