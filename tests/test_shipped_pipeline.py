"""The shipped pipeline generates images that match their prompts, on one rank and on several."""

import sys
from pathlib import Path

import numpy as np
import pytest
import running
from PIL import Image

from xfuser import xFuserArgs
from xfuser.cli import main as cli
from xfuser.cli.words import check_words, known_words
from xfuser.config.args import shipped_folder
from xfuser.testing.shapes import check, scenes

sys.path.insert(0, str(Path(__file__).parent.parent / "examples" / "tiny_model"))

import quality

PROMPTS = 24
PIXART, FLUX = (shipped_folder(name) for name in ("shapes-256", "shapes-256-flux"))
FORMAT = {"height": 256, "width": 256, "max_sequence_length": 31}
both_pipelines = pytest.mark.parametrize("folder", [PIXART, FLUX], ids=["pixart", "flux"])


def test_checker_is_right_about_true_pictures_and_spoilt_ones():
    assert min(check.true_rates(100, seed=3).values()) >= 0.97
    assert max(check.false_rates(20, seed=3).values()) <= 0.1


def test_distance_to_true_pictures_grows_with_what_is_wrong():
    rng = np.random.default_rng(0)
    drawn = [[scenes.render(scenes.sample_scene(rng)) for _ in range(40)] for _ in range(2)]
    true, others = (np.stack([check.features(picture) for picture in pictures]) for pictures in drawn)
    turned = np.stack([check.features(picture.rotate(20)) for picture in drawn[1]])
    scale = np.maximum(true.std(0), 0.05)
    assert check.frechet_distance(others, true, scale) < 0.5 * check.frechet_distance(turned, true, scale)


def test_table_of_methods_tells_worse_pictures_from_serial_ones(tmp_path, pool):
    """True images replace serial ones; images that are shifted by some pixels replace those of a method."""
    args = quality.parser().parse_args(["page", "--count", "6", "--steps", "1", "--work", str(tmp_path)])
    args.pipeline = "shapes-256"
    for method in (quality.SERIAL, "PipeFusion M = 4, W = 1"):
        folder = quality.folder_of(args, method)
        folder.mkdir(parents=True)
        for index, picture in enumerate(quality.true_pictures(args.count)):
            (picture if method == quality.SERIAL else picture.rotate(8)).save(folder / f"{index}.png")
    serial, worse = (line.split(" | ") for line in quality.methods_table(args)[2:])
    assert serial[2:6] == ["equal", "equal", "0", "1.000"] and float(serial[6].rstrip("| ")) < 0.01
    assert worse[5].endswith("(serial 1.000)") and float(worse[5].split()[0]) < 1 < float(worse[6].split()[0])
    picture = folder / "0.png"
    picture.unlink()
    pool.run(2, quality.draw_some, args, quality.METHODS["DistriFusion N = 2, W = 1"], [0], folder)
    assert Image.open(picture).size == (256, 256)


def test_the_pipeline_knows_the_words_of_its_world():
    assert known_words() == scenes.vocabulary()


def test_unknown_words_are_refused_with_the_nearest_known_ones(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["xdit", "--prompt", "A red cirle, above a sqare!", "--ulysses_degree", "2"])
    assert cli.main() == 1
    told = capsys.readouterr().err
    assert "'cirle' (near it: circle" in told and "'sqare' (near it: square" in told and "'red'" not in told
    assert "triangles, two" in cli.parser().format_help().replace("\n", " ")
    check_words("another/pipeline", ["a cactus"])


def test_a_shipped_pipeline_goes_by_its_name_and_has_its_size():
    for name in ("shapes-256", "shapes-256-flux"):
        engine, inputs = xFuserArgs(model=name, prompt="a red circle", width=272).checked()
        assert Path(engine.model_config.model, "model_index.json").exists()
        assert (inputs.height, inputs.width) == (256, 272)
    assert all(xFuserArgs(model=name).checked()[1].height is None for name in (None, "another/pipeline"))


def draw(folder, prompts):
    pipe = running.wrap(running.loaded(folder), {"data_parallel_degree": 2})
    pictures = pipe(prompts, guidance_scale=3.5, generator=running.seeded(), **FORMAT).images
    return [np.asarray(picture) for picture in pictures] if running.torch.distributed.get_rank() == 0 else None


@pytest.mark.matrix
@both_pipelines
def test_pictures_show_what_their_prompts_say(pool, folder):
    rng = np.random.default_rng(11)
    asked = [scenes.sample_scene(rng, held_out=True) for _ in range(PROMPTS)]
    pictures = pool.run(2, draw, folder, [scenes.caption(scene) for scene in asked])[0]
    verdicts = [check.check(Image.fromarray(one), scene) for one, scene in zip(pictures, asked, strict=True)]
    assert np.mean([all(verdict.values()) for verdict in verdicts]) >= 0.8


def test_trained_weights_keep_parity(pool):
    """Compare latents after two steps, as guidance and the decoder amplify the rounding of float32."""
    call = {"prompt": "a red circle above a blue square", "num_inference_steps": 2, "output_type": "latent"}
    call |= {"height": 208, "width": 272, "max_sequence_length": 31}
    guided = {"use_cfg_parallel": True, "ring_degree": 2}
    piped = {"pipefusion_parallel_degree": 2, "ulysses_degree": 2, "num_pipeline_patch": 3, "warmup_steps": 2}
    for folder, own, others in ((PIXART, {"use_resolution_binning": False}, guided), (FLUX, {}, piped)):
        expected = running.bare(folder, call | own)
        for degrees in ({"ulysses_degree": 4}, others):
            for result in pool.run(4, running.wrapped, folder, degrees, call | own):
                assert running.error(result, expected) <= running.TOLERANCE


@both_pipelines
def test_stale_keys_and_values_change_pictures_little(pool, folder):
    """PipeFusion's staleness affects trained weights, but images are nearly the same."""
    call = {"prompt": "a red circle above a blue square", "output_type": "np", "num_inference_steps": 20} | FORMAT
    serial = running.bare(folder, call)
    degrees = {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 4, "warmup_steps": 1}
    for picture in pool.run(2, running.wrapped, folder, degrees, call):
        decibels = -10 * np.log10(np.mean((picture - serial) ** 2))
        assert 28 <= decibels <= 70
