"""Whole programs as a user starts them: xdit, the examples by torchrun, and how they fail."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import imageio
import pytest
import unets
import whole
from PIL import Image

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


SMALL = ("--height", "80", "--width", "48", "--num_inference_steps", "2", "--no_use_resolution_binning")


def test_xdit_draws_the_same_on_one_rank_and_on_four(tmp_path, folder_of):
    common = ("--model", folder_of("pixart_sigma"), "--prompt", "a red circle", "the cat", *SMALL)
    degrees = ("--ulysses_degree", "2", "--data_parallel_degree", "2", "--output_dir", "four")
    one, four = xdit(tmp_path, *common), xdit(tmp_path, *common, *degrees)
    assert one.returncode == 0 and four.returncode == 0, one.stderr + four.stderr
    serial, parallel = (sorted(tmp_path.glob(f"{name}/*.png")) for name in ("results", "four"))
    assert [path.name[-6:] for path in parallel] == ["_0.png", "_1.png"]
    for path in parallel:
        assert str(path.relative_to(tmp_path)) in four.stdout
    assert "on 4 ranks (cpu), peak memory" in four.stdout
    for ours, reference in zip(parallel, serial, strict=True):
        pixels = [list(Image.open(path).convert("RGB").tobytes()) for path in (ours, reference)]
        assert max(abs(a - b) for a, b in zip(*pixels, strict=True)) <= 1  # rounding to 8 bits


def test_xdit_draws_a_preview_of_what_two_stages_draw(tmp_path):
    """PipeFusion on the shipped pipeline: four patches look the same on one rank and on two."""
    common = ("--prompt", "a red circle above a blue square", "--num_inference_steps", "4", "--num_pipeline_patch", "4")
    one = xdit(tmp_path, *common, "--output_dir", "one")
    two = xdit(tmp_path, *common, "--output_dir", "two", "--pipefusion_parallel_degree", "2")
    assert one.returncode == 0 and two.returncode == 0, one.stderr + two.stderr
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


def test_xdit_saves_a_video(tmp_path):
    """On two ranks, as MP4; without the encoder's program, as GIF of as many frames."""
    hidden = tmp_path / "hidden" / "imageio_ffmpeg.py"
    hidden.parent.mkdir()
    hidden.write_text("raise ImportError('hidden')")
    command = [sys.executable, "-m", "xfuser.cli", "--model", whole.save("ltx", tmp_path), *VIDEO]
    done = start([*command, "--ulysses_degree", "2", "--use_parallel_vae", "--output_dir", "two"], tmp_path)
    without = start(command, tmp_path, PYTHONPATH=f"{hidden.parent}:{ROOT}")
    assert done.returncode == 0 and without.returncode == 0, done.stderr + without.stderr
    (film,) = (tmp_path / "two").iterdir()
    assert str(film.relative_to(tmp_path)) in done.stdout
    assert film.suffix == ".mp4" and imageio.get_reader(film).count_frames() == 9
    (animation,) = (tmp_path / "results").iterdir()
    assert animation.suffix == ".gif" and Image.open(animation).n_frames == 9


def test_xdit_makes_a_video_of_a_picture(tmp_path):
    Image.new("RGB", (96, 160), (255, 0, 0)).save(tmp_path / "red.png")
    model = whole.save("ltx_i2v", tmp_path)
    done = xdit(tmp_path, "--model", model, *VIDEO, "--img_file_path", "red.png", "--use_cfg_parallel")
    assert done.returncode == 0, done.stderr
    (film,) = (tmp_path / "results").iterdir()
    assert film.stat().st_size > 0 and film.suffix == ".mp4"


@pytest.mark.parametrize("example", EXAMPLES)
def test_example_by_torchrun(tmp_path, folder_of, example):
    family, flags = EXAMPLES[example]
    size = ("--num_inference_steps", "2") if family == "dit" else SMALL[:-1]
    binning = () if family in ("dit", "sd3", "flux", "sdxl") else SMALL[-1:]
    prompt = ("--prompt", "1" if family == "dit" else "a red circle", "--max_sequence_length", "7")
    prompt = prompt[:2] if family in ("dit", "hunyuan_dit", "sd3", "sdxl") else prompt
    model = unets.save(family, tmp_path) if family in unets.PIPELINES else folder_of(family)
    done = torchrun(tmp_path, 2, ROOT / "examples" / example, "--model", model, *prompt, *size, *binning, *flags)
    assert done.returncode == 0, done.stderr
    written = [tmp_path / line for line in done.stdout.split()]
    assert written and all(path.is_file() and path.name.startswith(family) for path in written)


def test_every_example_is_tested():
    assert {path.name for path in (ROOT / "examples").glob("*.py")} == set(EXAMPLES)


def edited(folder_of, tmp_path, changes):
    """A pipeline folder whose model_index.json is changed."""
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
        (("--prompt", "x", "--use_torch_compile"), "not available yet"),
        (("--prompt", "x", "--vae_chunk_rows", "4"), "of use with use_parallel_vae alone"),
        (("--prompt", "x", "--ulysses_degree", "0"), "ulysses_degree=0"),
        (("--prompt", "x", "--model", "/nowhere"), "'/nowhere' does not exist"),
        (("--prompt", "x", "--model", "."), "has no model_index.json"),
        (("--ulysses_degree", "2"), "nothing to draw"),
    ],
)
def test_xdit_refuses_bad_input_once(tmp_path, flags, message):
    done = xdit(tmp_path, *flags)
    assert done.returncode == 1 and done.stderr.count("ValueError") == 1 and message in done.stderr
    assert not list(tmp_path.iterdir())


def test_xdit_refuses_unknown_transformers_and_unets_before_loading(tmp_path, folder_of):
    unet = edited(folder_of, tmp_path, {"transformer": [None, None], "unet": ["diffusers", "UNet3DConditionModel"]})
    done = xdit(tmp_path, "--prompt", "x", "--model", unet, "--ulysses_degree", "2")
    assert done.returncode == 1 and done.stderr.count("ValueError") == 1
    assert "no plan for UNet3DConditionModel" in done.stderr and "PixArtTransformer2DModel" in done.stderr


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--ulysses_degree", "3"), "With 2 ranks you can choose"),
        (("--ulysses_degree", "2", "--model", "/nowhere"), "does not exist"),
        (("--ulysses_degree", "2", "--img_file_path", "missing.png"), "has no image-to-image variant"),
    ],
)
def test_ranks_fail_with_one_message(tmp_path, folder_of, flags, message):
    """Bad input under torchrun: rank 0 says it, the others are quiet."""
    model = () if "--model" in flags else ("--model", folder_of("pixart_sigma"))
    done = torchrun(tmp_path, 2, ROOT / "examples/pixartsigma_example.py", *model, "--prompt", "x", *flags)
    assert done.returncode == 1 and done.stderr.count("\nValueError: ") == 1, done.stderr
    assert message in done.stderr
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
        ("ulysses_degree", 0, "RuntimeError"),
        ("ulysses_degree", 1, "RuntimeError"),
        ("ulysses_degree", 1, "ValueError"),
        ("pipefusion_parallel_degree", 0, "RuntimeError"),
        ("pipefusion_parallel_degree", 1, "RuntimeError"),
    ],
)
def test_a_failing_rank_ends_all_within_seconds(tmp_path, folder_of, degree, rank, error):
    script = tmp_path / "failing.py"
    script.write_text(FAILING.format(degree=degree, error=error))
    done = torchrun(tmp_path, 2, script, folder_of("sd3"), rank)
    assert done.returncode == 1 and time.time() - float(done.stdout.split()[-1]) < 10, done.stderr
    first = next(line for line in done.stderr.splitlines() if "Error: " in line)
    assert first == f"{error}: this rank fails", done.stderr


PROCESSOR = """
import sys, torch
from diffusers import DiffusionPipeline
from diffusers.models.attention_processor import AttnProcessor
from xfuser import xDiTParallel, xFuserArgs

pipe = DiffusionPipeline.from_pretrained(sys.argv[1])
pipe.transformer.set_attn_processor(AttnProcessor())
pipe = xDiTParallel(pipe, *xFuserArgs(ring_degree=2).create_config())
pipe("x", height=80, width=48, use_resolution_binning=False)
"""


def test_a_processor_without_sdpa_is_refused(tmp_path, folder_of):
    script = tmp_path / "processor.py"
    script.write_text(PROCESSOR)
    done = torchrun(tmp_path, 2, script, folder_of("pixart_sigma"))
    assert done.returncode == 1 and done.stderr.count("\nValueError: ") == 1, done.stderr
    assert "AttnProcessor called scaled_dot_product_attention 0 times" in done.stderr
