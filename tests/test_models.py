"""Plans fit the classes that they describe, and what has none is refused."""

import diffusers
import pytest
import tiny
import torch
import torch.distributed as dist

from xfuser import xDiTParallel, xFuserArgs
from xfuser.models.registry import PLANS, plan_of


def test_subclasses_share_the_plan():
    class Mine(diffusers.FluxTransformer2DModel):
        pass

    assert plan_of(Mine.from_config(tiny.flux_transformer().config)) is PLANS["FluxTransformer2DModel"]


def unet_pipeline():
    unet = diffusers.UNet2DModel(
        block_out_channels=(4, 4), layers_per_block=1, norm_num_groups=2, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    return diffusers.DDIMPipeline(unet=unet, scheduler=diffusers.DDIMScheduler())


def prior_pipeline():
    prior = diffusers.PriorTransformer(2, 4, 1, embedding_dim=8, num_embeddings=3)
    parts = dict.fromkeys(("image_encoder", "text_encoder", "tokenizer", "image_processor"))
    return diffusers.KandinskyV22PriorPipeline(prior, scheduler=diffusers.UnCLIPScheduler(), **parts)


def unknown_pipeline():
    pipe = tiny.build("pixart_sigma")
    pipe.components["transformer"] = pipe.transformer = torch.nn.Linear(1, 1)
    return pipe


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (unet_pipeline, "no plan for UNet2DModel. Known classes: AceStep"),
        (prior_pipeline, "PriorTransformer: it makes one embedding, .* docs/models.md"),
        (unknown_pipeline, "PixArtSigmaPipeline: there is no plan for Linear. Known .*docs/adding_models/README.md"),
        (object, "object is not a Diffusers pipeline"),
    ],
)
def test_pipelines_without_a_plan_are_refused_before_any_group(make, message):
    engine_config, _ = xFuserArgs().checked()
    with pytest.raises(ValueError, match=message):
        xDiTParallel(make(), engine_config)
    assert not dist.is_initialized()
