"""Modular pipelines run as classic ones do: the same two lines, call, ``active()``, ``save`` and guiders."""

from dataclasses import replace

import diffusers
import pytest
import running
import torch
from diffusers import DiffusionPipeline

from xfuser.testing import matrix
from xfuser.testing.zoo import FAMILIES, WORDS

USP = {"ulysses_degree": 2, "ring_degree": 2}
GUIDED = {"use_cfg_parallel": True}
SIZE = {"height": 80, "width": 48, "num_inference_steps": 2}


def assembled(blocks, path):
    """A modular pipeline with the components of a classic one."""
    pipe = blocks.init_pipeline()
    components = DiffusionPipeline.from_pretrained(path).components
    pipe.update_components(**{name: components[name] for name in pipe.component_names if components.get(name)})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def flux(path):
    return assembled(diffusers.FluxAutoBlocks(), path), SIZE | {"prompt": "a red circle", "max_sequence_length": 5}


def minimax_h3(path):
    """Behind its text encoder, and ahead of its VAEs: the steps that it consists of can be used alone."""
    from diffusers.modular_pipelines.minimax_h3.modular_blocks_minimax_h3 import MiniMaxH3CoreDenoiseStep

    family = FAMILIES["minimax_h3"]
    pipe = MiniMaxH3CoreDenoiseStep().init_pipeline()
    pipe.update_components(
        transformer=replace(family, config=family.config | {"in_channels": 24, "audio_in_channels": 32}).build(),
        scheduler=diffusers.MiniMaxH3Scheduler(),
        audio_scheduler=diffusers.MiniMaxH3Scheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    text = {"prompt_embeds": torch.ones(1, WORDS, 16).cumsum(1), "text_token_tags": torch.ones(WORDS, dtype=torch.long)}
    return pipe, text | {"height": 64, "width": 96, "num_frames": 124, "num_inference_steps": 3}


MAKERS = {"flux": (flux, "images"), "minimax_h3": (minimax_h3, "latents")}


def drawn(name, path, degrees, **changes):
    """What a modular pipeline draws, wrapped with these degrees, or bare where they are None; and through a state."""
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
        ("minimax_h3", 4, USP),
    ],
)
def test_equals_serial(pool, folder_of, name, ranks, degrees):
    path = folder_of("flux")
    expected = drawn(name, path, None)
    for result in pool.run(ranks, drawn, name, path, degrees):
        assert matrix.error([result], [expected]) <= matrix.TOLERANCE
