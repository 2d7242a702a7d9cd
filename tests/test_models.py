"""Plans fit their classes, and classes without a plan are refused."""

from functools import partial

import diffusers
import pytest
import tiny
import torch
import torch.distributed as dist

from xfuser import xDiTParallel, xFuserArgs
from xfuser.core.hooks import Binder
from xfuser.models.plan import blocks_of
from xfuser.models.registry import PLANS, plan_of
from xfuser.testing.loop import loop_of
from xfuser.testing.zoo import FAMILIES


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


def linears_of_text(family):
    """Return the linears of a family's first block with as many input tokens as the text, and not the image."""
    loop, found, others, tokens = loop_of(family), set(), set(), []
    plan = plan_of(loop.transformer)
    block = blocks_of(loop.transformer, plan)[0].module
    bind = Binder(block.forward)

    def count(_, args, kwargs):
        given = bind(args, kwargs)
        tokens[:] = [given[name].shape[1] for name in (plan.image, plan.text) if given.get(name) is not None]

    def look(name, _, args):
        of_text = len(tokens) == 2 and tokens[0] != args[0].shape[1] == tokens[1] and args[0].dim() == 3
        (found if of_text else others).add(name)

    block.register_forward_pre_hook(count, with_kwargs=True)
    for name, one in block.named_modules():
        if isinstance(one, torch.nn.Linear):
            one.register_forward_pre_hook(partial(look, name))
    loop(family, num_inference_steps=1)
    return {name for name in found - others if not f"{name}.".startswith(tuple(f"{one}." for one in plan.text_modules))}


def test_linears_that_see_text_alone_are_named():
    """They balance the stages of PipeFusion: counted with the image's tokens, they would cost many times more."""
    families = {name: one for name, one in FAMILIES.items() if one.present and PLANS[one.cls].text}
    left = {name: linears_of_text(one) for name, one in families.items() if not PLANS[one.cls].unpiped}
    assert not {name: found for name, found in left.items() if found}
