"""Modular pipelines run like classic ones: the same two lines, call, ``active()``, ``save`` and guiders."""

from dataclasses import replace

import diffusers
import pytest
import running
import tiny
import torch
import unets
import whole
from diffusers import DiffusionPipeline

from xfuser.testing import matrix
from xfuser.testing.zoo import FAMILIES, TEXT, WORDS

USP = {"ulysses_degree": 2, "ring_degree": 2}
GUIDED = {"use_cfg_parallel": True}
SIZE = {"height": 80, "width": 48, "num_inference_steps": 2}


def assembled(blocks, classic):
    """Return a modular pipeline with the components of a classic one."""
    pipe, components = blocks.init_pipeline(), classic.components
    pipe.update_components(**{name: components[name] for name in pipe.component_names if components.get(name)})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux(path):
    return assembled(diffusers.FluxAutoBlocks(), DiffusionPipeline.from_pretrained(path)), SIZE | {
        "prompt": "a red circle",
        "max_sequence_length": 5,
    }


def minimax_h3(path):
    """Run only the steps after the text encoder and before the VAEs, which can be used separately."""
    from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import MiniMaxH3CoreDenoiseStep

    family = FAMILIES["minimax_h3"]
    pipe = MiniMaxH3CoreDenoiseStep().init_pipeline()
    pipe.update_components(
        transformer=replace(family, config=family.config | {"in_channels": 24, "audio_in_channels": 32}).build(),
        scheduler=diffusers.MiniMaxH3Scheduler(),
        audio_scheduler=diffusers.MiniMaxH3Scheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    text = {
        "prompt_embeds": torch.ones(1, WORDS, TEXT).cumsum(1),
        "text_token_tags": torch.ones(WORDS, dtype=torch.long),
    }
    return pipe, text | {"height": 64, "width": 96, "num_frames": 124, "num_inference_steps": 3}


def sdxl(path):
    call = {"prompt": "a red circle", "negative_prompt": "blue", "height": 64, "width": 48, "num_inference_steps": 2}
    return assembled(diffusers.StableDiffusionXLAutoBlocks(), DiffusionPipeline.from_pretrained(path)), call


def guided(blocks, classic):
    """Run the steps after the text encoder, with the guider of the blocks."""
    del blocks.sub_blocks["text_encoder"]
    pipe = assembled(blocks, classic)
    rows = torch.Generator().manual_seed(1)
    embeds = {f"{sign}prompt_embeds": torch.randn(1, WORDS, TEXT, generator=rows) for sign in ("", "negative_")}
    return pipe, SIZE | embeds


def wan(path):
    pipe, call = guided(diffusers.WanBlocks(), whole.loaded(path, "wan"))
    return pipe, call | {"num_frames": 9}


def qwen_image(path):
    pipe, call = guided(diffusers.QwenImageAutoBlocks(), whole.loaded(path, "qwen_image"))
    masks = {f"{sign}prompt_embeds_mask": torch.ones(1, WORDS, dtype=torch.long) for sign in ("", "negative_")}
    return pipe, call | masks


def flux3(path, **more):
    """Run the steps after the text encoder; the two prompts differ in length."""
    blocks, family = diffusers.Flux3AutoBlocks(), FAMILIES["flux3"]
    for name in ("prompt_upsampler", "text_encoder"):
        del blocks.sub_blocks[name]
    pipe = blocks.init_pipeline()
    pipe.update_components(
        transformer=family.build(),
        vae=tiny.coder("AutoencoderKLFlux2", latent_channels=2),
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    embeds = {"prompt_embeds": whole.rows(WORDS)[None], "negative_prompt_embeds": whole.rows(5)[None]}
    return pipe, SIZE | embeds | more


def flux3_with_picture(path):
    return flux3(path, image=whole.picture(64, 40))


MAKERS = {
    "flux": (flux, "images"),
    "flux3": (flux3, "images"),
    "flux3_with_picture": (flux3_with_picture, "images"),
    "minimax_h3": (minimax_h3, "latents"),
    "qwen_image": (qwen_image, "images"),
    "sdxl": (sdxl, "images"),
    "wan": (wan, "videos"),
}


@pytest.fixture(scope="module")
def path_of(folder_of, tmp_path_factory):
    root = tmp_path_factory.mktemp("modular")
    savers = {"sdxl": unets.save, "wan": whole.save, "qwen_image": whole.save}
    return lambda name: savers[name](name, root) if name in savers else folder_of("flux")


def drawn(name, path, degrees, **changes):
    """Run a modular pipeline wrapped with these degrees, or unwrapped if they are None."""
    make, output = MAKERS[name]
    pipe, call = make(path)
    call |= {"output_type": "pt", "generator": torch.Generator().manual_seed(0)} | changes
    if degrees is None:
        return pipe(**call, output=output)
    wrapped = running.wrap(pipe, degrees)
    result = wrapped(**call, output=output)
    wrapped.unwrap()
    return result


@pytest.mark.parametrize(
    ("name", "ranks", "degrees"),
    [
        ("flux", 4, USP),
        ("flux", 2, {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 2, "warmup_steps": 2}),
        ("flux3", 4, GUIDED | {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 2, "warmup_steps": 2}),
        ("flux3_with_picture", 4, GUIDED | {"ulysses_degree": 2}),
        ("minimax_h3", 4, USP),
        ("sdxl", 2, GUIDED),
        ("wan", 4, GUIDED | {"ulysses_degree": 2}),
        ("qwen_image", 4, GUIDED | {"ring_degree": 2}),
    ],
)
def test_equals_serial(pool, path_of, name, ranks, degrees):
    path = path_of(name)
    expected = drawn(name, path, None)
    for result in pool.run(ranks, drawn, name, path, degrees):
        assert matrix.error([result], [expected]) <= matrix.TOLERANCE


def saved(path, folder):
    """Return the files of a wrapped modular pipeline for named results and for its state, and ``active()``'s result."""
    pipe, call = flux(path)
    wrapped = running.wrap(pipe, {"ulysses_degree": 2})
    files = []
    for output in ("images", ["images", "latents"], None):
        wrapped(**call, output=output, generator=torch.Generator().manual_seed(0))
        files += wrapped.save(folder, prefix=str(len(files)))
    with wrapped.active():
        inside = pipe(**call, output="images", output_type="pt", generator=torch.Generator().manual_seed(0))
    wrapped.unwrap()
    return files, inside


def test_results_by_name_are_saved_and_loops_run_within_active(pool, folder_of, tmp_path):
    results = pool.run(2, saved, folder_of("flux"), str(tmp_path))
    assert len(results[0][0]) == 3 and all(name.endswith(".png") for name in results[0][0])
    expected = drawn("flux", folder_of("flux"), None)
    assert matrix.error([results[1][1]], [expected]) <= matrix.TOLERANCE
