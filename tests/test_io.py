"""Input and output: arguments of a pipeline's call, loading, and saving of results."""

import logging

import numpy as np
import pytest
import running
import tiny
import torch
import whole
from PIL import Image
from safetensors.torch import load_file

from xfuser import load_pipeline, xFuserArgs
from xfuser.pipeline_io.arguments import pipeline_arguments
from xfuser.pipeline_io.media import check_writable, write_media


def arguments(family, **fields):
    return pipeline_arguments(tiny.build(family), xFuserArgs(**fields).checked()[1])


def test_arguments_are_those_that_the_pipeline_takes():
    call = arguments("sd3", prompt=["a", "b"], negative_prompt="bad", height=64, seed=3, max_sequence_length=9)
    assert call["prompt"] == ["a", "b"] and call["negative_prompt"] == ["bad", "bad"]
    assert (call["height"], call["max_sequence_length"], call["guidance_scale"]) == (64, 9, 3.5)
    assert "width" not in call and "use_resolution_binning" not in call
    assert call["generator"].initial_seed() == 3
    assert arguments("pixart_sigma", prompt="a", no_use_resolution_binning=True)["use_resolution_binning"] is False


def test_frames_are_called_as_the_pipeline_calls_them():
    for name, called in (("ltx", "num_frames"), ("latte", "video_length")):
        asked = xFuserArgs(prompt="a", num_frames=9).checked()[1]
        assert pipeline_arguments(whole.built(name), asked)[called] == 9


def test_guidance_can_be_switched_off_and_true_guidance_on():
    assert arguments("sd3", prompt="a", do_classifier_free_guidance=False)["guidance_scale"] == 1.0
    flux = {"prompt": "a", "negative_prompt": "b", "guidance_scale": 2.0}
    assert arguments("flux", **flux)["true_cfg_scale"] == 2.0
    assert arguments("flux", **flux, do_classifier_free_guidance=False)["true_cfg_scale"] == 1.0
    assert arguments("flux", prompt="a")["true_cfg_scale"] == 1.0
    for parallel in (False, True):  # degrees do not change the image
        assert arguments("flux", **flux, use_cfg_parallel=parallel)["true_cfg_scale"] == 2.0


def test_classes_by_name_or_number():
    assert arguments("dit", prompt=["square", "7"])["class_labels"] == [1, 7]
    with pytest.raises(ValueError, match="knows none called 'dog': give a class number, or a name such as circle"):
        arguments("dit", prompt="dog")


@pytest.mark.parametrize(
    ("family", "fields", "message"),
    [
        ("sd3", {"prompt": ""}, "nothing to draw"),
        ("dit", {"prompt": "1", "height": 64}, "DiTPipeline takes no height"),
        ("flux", {"prompt": "a", "num_frames": 9}, "FluxPipeline takes no num_frames"),
        ("flux", {"prompt": "a", "no_use_resolution_binning": True}, "takes no use_resolution_binning"),
        ("flux", {"prompt": "a", "use_cfg_parallel": True}, "only with a negative prompt"),
    ],
)
def test_what_a_pipeline_does_not_take_is_refused(family, fields, message):
    with pytest.raises(ValueError, match=message):
        arguments(family, **fields)


def save_everything(path, folder):
    """Save a batch of three for each output type; return this rank's files."""
    pipe = running.wrap(running.loaded(path), {"data_parallel_degree": 2, "ring_degree": 2})
    written = {}
    for kind in ("pil", "np", "pt", "latent"):
        pipe(**tiny.call_of("sd3", 3, output_type=kind, num_inference_steps=1), generator=running.seeded())
        written[kind] = pipe.save(f"{folder}/{kind}", "../un safe/name")
    return written


def test_each_image_is_saved_once_by_its_owner(pool, folder_of, tmp_path):
    by_rank = pool.run(4, save_everything, folder_of("sd3"), str(tmp_path))
    for kind, ending in {"pil": "png", "np": "png", "pt": "png", "latent": "safetensors"}.items():
        assert [len(written[kind]) for written in by_rank] == [2, 0, 1, 0]
        names = [f"_un_safe_name_result_dp2_cfg1_ulysses1_ring2_tp1_pp1_patch1_{i}.{ending}" for i in range(3)]
        assert sorted(path.name for path in (tmp_path / kind).iterdir()) == names
    pixels = [
        np.asarray(Image.open(tmp_path / kind / names[0].replace("safetensors", "png"))) for kind in ("pil", "pt")
    ]
    assert pixels[0].shape == (80, 48, 3) and np.abs(pixels[0].astype(int) - pixels[1]).max() <= 1
    assert load_file(tmp_path / "latent" / names[0])["latents"].shape == (16, 10, 6)


def test_videos_become_mp4_or_gif(tmp_path, monkeypatch):
    frames = [Image.new("RGB", (16, 16), (8 * i, 0, 0)) for i in range(5)]
    path = write_media(frames, str(tmp_path), "clip")
    assert path.endswith(("clip.mp4", "clip.gif"))

    def no_encoder(*args, **kwargs):
        raise ImportError("no encoder")

    monkeypatch.setattr("diffusers.utils.export_to_video", no_encoder)
    path = write_media(np.stack([np.asarray(frame) / 255 for frame in frames]), str(tmp_path), "array")
    assert path.endswith("array.gif") and Image.open(path).n_frames == 5


def loaded_with(path, **fields):
    return load_pipeline(xFuserArgs(model=path, **fields).create_config()[0])


def load_variants(path):
    pipe = loaded_with(path, enable_tiling=True, enable_slicing=True, dtype="bf16")
    assert pipe.transformer.dtype is torch.bfloat16 and pipe.vae.use_tiling and pipe.vae.use_slicing
    small = loaded_with(path, use_fp8_t5_encoder=True)
    stored = {weight.dtype for name, weight in small.text_encoder_3.named_parameters() if "SelfAttention.q" in name}
    call = tiny.call_of("sd3", 1)
    plain, rounded = (running.array(one(**call, generator=running.seeded())) for one in (loaded_with(path), small))
    return stored, running.error(rounded, plain)


def test_loading_options_do_what_they_say(pool, folder_of):
    ((stored, difference),) = pool.run(1, load_variants, folder_of("sd3"))
    assert stored == {torch.float8_e4m3fn} and 0 < difference < 0.1


def warnings_without_guidance(path):
    seen = []
    handler = logging.Handler()
    handler.emit = lambda record: seen.append(record.getMessage())
    logging.getLogger("xfuser").addHandler(handler)
    pipe = running.wrap(running.loaded(path), {"use_cfg_parallel": True})
    pipe(**tiny.call_of("sd3", 1, guidance_scale=1.0), generator=running.seeded())
    return seen


def test_guidance_ranks_without_guidance_are_warned_of(pool, folder_of):
    (message,) = pool.run(2, warnings_without_guidance, folder_of("sd3"))[0]
    assert "runs no classifier-free guidance" in message


def test_a_file_is_there_whole_or_not_at_all(tmp_path):
    """A failed write leaves the previous image, and no other file."""
    path = write_media(Image.new("RGB", (4, 4), (255, 0, 0)), str(tmp_path), "picture")
    with pytest.raises(OSError, match="HSV"):
        write_media(Image.new("HSV", (4, 4)), str(tmp_path), "picture")
    assert Image.open(path).getpixel((0, 0)) == (255, 0, 0)
    assert [entry.name for entry in tmp_path.iterdir()] == ["picture.png"]


def test_folders_that_cannot_be_written_are_named_and_nothing_is_made(tmp_path):
    (tmp_path / "file").write_text("")
    check_writable(str(tmp_path / "new" / "deeper"))
    for folder in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(ValueError, match=r"file.*name another one"):
            check_writable(str(folder))
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]
