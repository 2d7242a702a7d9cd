"""U-Nets: their pipelines under the methods that support them, and the errors of the other methods."""

from contextlib import contextmanager, nullcontext

import diffusers
import displaced_unet
import pytest
import running
import torch
import torch.distributed as dist
import torch.nn.functional as F
import unets

import xfuser
from xfuser import legacy, xDiTParallel, xFuserArgs
from xfuser.call import CallState
from xfuser.config.config import MODES
from xfuser.core.distributed.utils import share
from xfuser.core.hooks import replaced
from xfuser.methods.staleness import Staleness
from xfuser.methods.unet.map_bands import MapBands, OnMaps

CFG, DP = {"use_cfg_parallel": True}, {"data_parallel_degree": 2}
ASYNCHRONOUS = [mode for mode in MODES if mode != "full_sync"]
EDGES = {  # edges of the bands of 17 rows; groups of 4 or 8 rows stay together
    ("sdxl", 2): [0, 12, 17],
    ("sdxl", 3): [0, 8, 16, 17],
    ("sd15", 2): [0, 16, 17],
}


@pytest.fixture(scope="session")
def path_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("unets")
    return lambda name: unets.save(name, root)


def draw(path, degrees, call, changes):
    return unets.draw(path, degrees, *call, **changes)


def defined(path, semantics, *call, **changes):
    """Run the unwrapped pipeline within a context of the oracle."""
    with semantics(unets.loaded(path, "text").unet):
        return unets.draw(path, None, *call, **changes)


def displaced(name, ranks, mode, warmup):
    return lambda unet: displaced_unet.DisplacedUNet(unet, EDGES[name, ranks], mode, warmup).active()


def check(pool, path, ranks, degrees, *call, semantics=lambda unet: nullcontext(), **changes):
    expected = defined(path, semantics, *call, **changes)
    for result in pool.run(ranks, draw, path, degrees, call, changes):
        assert running.error(result, expected) <= running.TOLERANCE
    return expected


@pytest.mark.parametrize(
    ("name", "ranks", "degrees", "images", "kind"),
    [
        ("sdxl", 2, CFG, 1, "text"),
        ("sdxl", 4, CFG | DP, 3, "controlnet"),
        ("sdxl", 2, DP, 3, "image"),
        ("sdxl", 2, CFG, 1, "inpaint"),
        ("sdxl", 2, CFG, 2, "adapter"),
        ("sd15", 2, CFG, 3, "text"),
        ("sd15", 2, DP, 2, "inpaint"),
        ("sdxl", 2, DP, 3, "adapter"),
        ("sdxl", 2, {"tensor_parallel_degree": 2}, 1, "adapter"),
    ],
)
def test_guidance_and_data_parallelism(pool, path_of, name, ranks, degrees, images, kind):
    check(pool, path_of(name), ranks, degrees, images, kind)


def synchronous(ranks, **others):
    return {"distrifusion_degree": ranks, "distrifusion_mode": "full_sync"} | others


@pytest.mark.parametrize(
    ("name", "ranks", "degrees", "images", "kind", "changes"),
    [
        ("sdxl", 2, {"distrifusion_degree": 2, "warmup_steps": 3, "use_parallel_vae": True}, 1, "text", {}),
        ("sdxl", 3, synchronous(3), 3, "controlnet", {}),
        ("sdxl", 4, synchronous(2) | CFG, 1, "inpaint", {}),
        ("sdxl", 4, synchronous(4), 1, "text", {"height": 160, "width": 40}),
        ("sdxl", 2, synchronous(2, attention_backend="math"), 1, "adapter", {}),
        ("sdxl", 4, synchronous(2, tensor_parallel_degree=2), 1, "text", {}),
        ("sd15", 3, synchronous(3), 1, "image", {}),
        ("sd15", 4, synchronous(2) | DP, 2, "text", {"height": 128, "width": 64}),
    ],
)
def test_waiting_steps_equal_serial(pool, path_of, name, ranks, degrees, images, kind, changes):
    """Bands are uneven, and have only one row in the middle of the U-Net."""
    check(pool, path_of(name), ranks, degrees, images, kind, **changes)


LATENT = {"num_inference_steps": 4, "output_type": "latent"}


@pytest.mark.parametrize(
    ("name", "mode", "ranks", "warmup"),
    [
        *(("sdxl", mode, 2, 1) for mode in ASYNCHRONOUS),
        ("sdxl", "corrected_async_gn", 3, 0),
        ("sdxl", "stale_gn", 3, 2),
        ("sd15", "corrected_async_gn", 2, 1),
    ],
)
def test_asynchronous_steps_equal_the_definition(pool, path_of, name, mode, ranks, warmup):
    degrees = {"distrifusion_degree": ranks, "distrifusion_mode": mode, "warmup_steps": warmup}
    path, semantics = path_of(name), displaced(name, ranks, mode, warmup)
    expected = check(pool, path, ranks, degrees, semantics=semantics, **LATENT)
    assert running.error(expected, unets.draw(path, None, **LATENT)) > 100 * running.TOLERANCE


@pytest.mark.parametrize("hybrid", [CFG, DP])
def test_hybrids_equal_the_definition(pool, path_of, hybrid):
    degrees = {"distrifusion_degree": 2} | hybrid
    check(pool, path_of("sdxl"), 4, degrees, 3, semantics=displaced("sdxl", 2, "corrected_async_gn", 1), **LATENT)


def test_a_second_picture_starts_anew(pool, path_of):
    """Nothing is left of the first image's rows, also if the second one has another size."""
    calls = [unets.call_of(1, **LATENT), unets.call_of(2, height=64, width=96, num_inference_steps=1)]
    for first, second, third in pool.run(
        2, running.wrapped_calls, path_of("sdxl"), {"distrifusion_degree": 2}, [*calls, calls[0]]
    ):
        assert running.error(second, running.bare(path_of("sdxl"), calls[1])) <= running.TOLERANCE
        assert (first == third).all()


def guided_now_and_then(path, degrees):
    """A callback drops the unconditional half of the batch after the first step, and doubles the batch afterwards."""

    def change(pipe, step, timestep, values):
        pipe._guidance_scale = 3.0 * (step > 0)
        return {name: torch.cat([x, -x]) if step else x.chunk(2)[1] for name, x in values.items()}

    names = ["prompt_embeds", "add_text_embeds", "add_time_ids"]
    call = {"callback_on_step_end": change, "callback_on_step_end_tensor_inputs": names}
    return unets.draw(path, degrees, 1, **LATENT | call | {"num_inference_steps": 3})


def test_a_batch_that_changes_waits_for_its_rows(pool, path_of):
    expected = guided_now_and_then(path_of("sdxl"), None)
    for result in pool.run(4, guided_now_and_then, path_of("sdxl"), {"distrifusion_degree": 2} | CFG):
        assert running.error(result, expected) <= running.TOLERANCE


@contextmanager
def pictures_of_their_own(unet, scheme):
    """Naive patches by definition: each band runs through the U-Net separately."""
    original, steps = unet.forward, []

    def forward(sample, *args, **kwargs):
        dim = 3 if scheme == "col" or (scheme == "alternate" and len(steps) % 2) else 2
        steps.append(dim)
        sizes = {17: (12, 5), 13: (8, 5)}[sample.shape[dim]]
        parts = [original(part, *args, **kwargs)[0] for part in sample.split(sizes, dim)]
        return (torch.cat(parts, dim),)

    with replaced(unet, "forward", forward):
        yield


@pytest.mark.parametrize("scheme", ["row", "col", "alternate"])
def test_naive_patches_know_nothing_of_each_other(pool, path_of, scheme):
    degrees = {"naive_patch_degree": 2, "split_scheme": scheme}
    expected = check(
        pool, path_of("sdxl"), 2, degrees, semantics=lambda unet: pictures_of_their_own(unet, scheme), **LATENT
    )
    assert running.error(expected, unets.draw(path_of("sdxl"), None, **LATENT)) > 100 * running.TOLERANCE


def loaded_and_wrapped(path):
    """Use the classes that load and wrap in one call, of this package and of its first generation."""
    config = legacy.DistriConfig(height=136, width=104, mode="full_sync", warmup_steps=0)
    call = unets.call_of(2)
    pictures = []
    for cls, given in (
        (xfuser.xFuserStableDiffusionXLPipeline, {"engine_config": config.engine_config}),
        (legacy.DistriSDXLPipeline, {"distri_config": config}),
    ):
        pipe = cls.from_pretrained(pretrained_model_name_or_path=path, **given)
        pictures.append(running.array(pipe(**call, generator=running.seeded())))
    return pictures


def test_classes_that_load_and_wrap(pool, path_of):
    expected = unets.draw(path_of("sdxl"), None, 2)
    for pictures in pool.run(4, loaded_and_wrapped, path_of("sdxl")):
        assert max(running.error(picture, expected) for picture in pictures) <= running.TOLERANCE


SIZES = [7, 2, 3]
WEIGHT = torch.randn(6, 6, 5, 3, generator=torch.Generator().manual_seed(3))
CONVOLUTIONS = {
    "3x3": lambda x: F.conv2d(x, WEIGHT[:, :, :3], padding=1),
    "5x3": lambda x: F.conv2d(x, WEIGHT, padding=(2, 1)),
    "dilated": lambda x: F.conv2d(x, WEIGHT[:, :, :3], padding=2, dilation=2),
    "halving": lambda x: F.conv2d(x, WEIGHT[:, :, :3], stride=2, padding=1),
    "pointwise": lambda x: F.conv2d(x, WEIGHT[:, :, :1, :1]),
}


def norm(x):
    return F.group_norm(x, 3, WEIGHT[0, :, 0, 0], WEIGHT[1, :, 0, 0])


def maps():
    """Return a map for each of three steps; small rows in the last one make a corrected variance negative."""
    drawn = [torch.randn(2, 6, sum(SIZES), 5, generator=torch.Generator().manual_seed(step)) for step in range(3)]
    drawn[1][:, :, :7] *= 6
    drawn[2][:, :, :7] *= 0.1
    return drawn


def leaf(mode, kind):
    """Return the results of a layer on this rank's band in a synchronous step and two steps after it."""
    call, rank, results = CallState(), dist.get_rank(), []
    staleness = Staleness(dist.group.WORLD, mode, call)
    for x in maps():
        own = share(SIZES, rank)
        band = x[:, :, own.start : own.stop]

        def compute(arguments, band=band):
            mode = OnMaps(MapBands(SIZES, 5, staleness))
            with mode:
                if kind != "attention":
                    return norm(band) if kind == "norm" else CONVOLUTIONS[kind](band)
                tokens = band.flatten(2).mT.unflatten(2, (2, 3)).transpose(1, 2)
                with mode.attending(), mode.bands.reach(tokens, 2 * tokens) as (keys, values):
                    return F.scaled_dot_product_attention(tokens, keys, values)

        call.index = 0
        results.append(staleness.layer(compute, {"x": x}))
        call.step += 1
    staleness.restart()
    return results


def seen(step, rank, mode):
    """Return the map that a rank uses: its own rows of this step, and others by the mode."""
    before = {"full_sync": step, "no_sync": 0}.get(mode, max(step - 1, 0))
    whole, own = maps()[before].clone(), share(SIZES, rank)
    whole[:, :, own.start : own.stop] = maps()[step][:, :, own.start : own.stop]
    return whole


def band_of(whole, rank, halved=False):
    own = share(SIZES, rank)
    return whole[:, :, -(-own.start // 2) : -(-own.stop // 2)] if halved else whole[:, :, own.start : own.stop]


@pytest.mark.parametrize("kind", CONVOLUTIONS)
@pytest.mark.parametrize("mode", ["corrected_async_gn", "no_sync", "full_sync"])
def test_convolution(pool, kind, mode):
    """Includes bands with fewer rows than a kernel reaches."""
    for rank, results in enumerate(pool.run(3, leaf, mode, kind)):
        for step, result in enumerate(results):
            expected = band_of(CONVOLUTIONS[kind](seen(step, rank, mode)), rank, kind == "halving")
            assert torch.allclose(result, expected, atol=1e-5)


@pytest.mark.parametrize("mode", ["corrected_async_gn", "no_sync", "full_sync"])
def test_attention(pool, mode):
    for rank, results in enumerate(pool.run(3, leaf, mode, "attention")):
        for step, result in enumerate(results):
            tokens = seen(step, rank, mode).flatten(2).mT.unflatten(2, (2, 3)).transpose(1, 2)
            own = share(SIZES, rank)
            queries = tokens[:, :, 5 * own.start : 5 * own.stop]
            assert torch.allclose(result, F.scaled_dot_product_attention(queries, tokens, 2 * tokens), atol=1e-5)


def moments(x):
    x = x.double().reshape(2, 3, -1)
    return torch.stack([x.mean(2), x.square().mean(2)])


def moments_of(step, rank, mode):
    """Return the mean and mean of squares of a rank's group norm in a step."""
    now, last = maps()[step], maps()[max(step - 1, 0)]
    own = moments(band_of(now, rank))
    if step == 0 or mode in ("sync_gn", "full_sync"):
        return moments(now)
    if mode in ("separate_gn", "no_sync"):
        return own
    if mode == "stale_gn":
        return moments(seen(step, rank, mode))
    mean, square = moments(last) + own - moments(band_of(last, rank))
    below = square < mean.square()
    return torch.stack([mean, torch.where(below, own[1] - own[0].square() + mean.square(), square)])


@pytest.mark.parametrize("mode", MODES)
def test_group_norm(pool, mode):
    for rank, results in enumerate(pool.run(3, leaf, mode, "norm")):
        for step, result in enumerate(results):
            mean, square = (one[..., None] for one in moments_of(step, rank, mode))
            x = band_of(maps()[step], rank)
            expected = (x.double().reshape(2, 3, -1) - mean) / (square - mean.square() + 1e-5).sqrt()
            expected = expected.view(x.shape) * WEIGHT[0, :, :1, :1] + WEIGHT[1, :, :1, :1]
            assert running.error(result.numpy(), expected.numpy()) <= running.TOLERANCE


def test_the_maps_above_make_a_corrected_variance_negative():
    last, now = maps()[1:]
    mean, square = moments(last) + moments(band_of(now, 0)) - moments(band_of(last, 0))
    assert (square < mean.square()).any()


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"ulysses_degree": 2}, "sequence parallelism .* does not support UNet2DConditionModel: .* maps of several"),
        ({"pipefusion_parallel_degree": 2}, "PipeFusion does not support UNet2DConditionModel: .* Use CFG, data"),
        ({"num_pipeline_patch": 2}, "PipeFusion does not support"),
    ],
)
def test_methods_over_tokens_and_stages_are_refused_before_any_group(path_of, degrees, message):
    with pytest.raises(ValueError, match=message):
        xFuserArgs(model=path_of("sdxl"), **degrees).checked()
    engine_config, _ = xFuserArgs(**degrees).checked()
    with pytest.raises(ValueError, match=message):
        xDiTParallel(running.loaded(path_of("sdxl")), engine_config)
    assert not dist.is_initialized()


def refusals(path):
    """Return the errors of unsupported calls, each of which must leave the pipeline unchanged."""
    pipe, said = running.loaded(path), {}

    def refused(name, **changes):
        with pytest.raises(ValueError) as error:
            unets.draw(path, {"distrifusion_degree": 2}, **changes)
        said[name] = str(error.value)

    refused("few rows", height=32)
    pipe.enable_freeu(0.9, 0.2, 1.2, 1.4)
    refused("FreeU")
    pipe.disable_freeu()
    usual = pipe.unet.attn_processors
    pipe.unet.set_attn_processor(diffusers.models.attention_processor.AttnProcessor())
    refused("processor")
    pipe.unet.set_attn_processor(usual)
    sampler = pipe.unet.down_blocks[0].downsamplers[0]
    sampler.padding, sampler.conv.padding = 0, (0, 0)
    refused("other halves")
    sampler.padding, sampler.conv.padding = 1, (1, 1)
    return said, unets.draw(path, synchronous(2))


def test_what_cannot_be_divided_is_refused(pool, path_of):
    expected = unets.draw(path_of("sdxl"), None)
    for said, after in pool.run(2, refusals, path_of("sdxl")):
        assert "use a degree of at most 1" in said["few rows"]
        assert "DistriFusion: " in said["FreeU"] and "fft" in said["FreeU"]
        assert "DistriFusion: " in said["processor"]
        assert "17 rows have become 8" in said["other halves"]
        assert running.error(after, expected) <= running.TOLERANCE
