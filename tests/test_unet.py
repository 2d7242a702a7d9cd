"""U-Nets: pipelines over them under the methods that serve them, and what those that do not serve them say."""

import displaced_unet
import pytest
import running
import torch.distributed as dist
import unets

from xfuser import xDiTParallel, xFuserArgs
from xfuser.core.staleness import MODES

CFG, DP = {"use_cfg_parallel": True}, {"data_parallel_degree": 2}


@pytest.fixture(scope="session")
def path_of(tmp_path_factory):
    root = tmp_path_factory.mktemp("unets")
    return lambda name: unets.save(name, root)


def check(pool, path, ranks, degrees, *call, **changes):
    expected = unets.draw(path, None, *call, **changes)
    for result in pool.run(ranks, draw, path, degrees, call, changes):
        assert running.error(result, expected) <= running.TOLERANCE


def draw(path, degrees, call, changes):
    return unets.draw(path, degrees, *call, **changes)


@pytest.mark.parametrize(
    ("name", "ranks", "degrees", "images", "kind"),
    [
        ("sdxl", 2, CFG, 1, "text"),
        ("sdxl", 4, CFG | DP, 3, "controlnet"),
        ("sdxl", 2, DP, 3, "image"),
        ("sdxl", 2, CFG, 1, "inpaint"),
        ("sd15", 2, CFG, 3, "text"),
        ("sd15", 2, DP, 2, "inpaint"),
    ],
)
def test_guidance_and_data_parallelism(pool, path_of, name, ranks, degrees, images, kind):
    check(pool, path_of(name), ranks, degrees, images, kind)


def synchronous(ranks, **changes):
    return {"distrifusion_degree": ranks, "distrifusion_mode": "full_sync"} | changes


@pytest.mark.parametrize(
    ("name", "ranks", "degrees", "images", "kind", "changes"),
    [
        ("sdxl", 2, synchronous(2), 1, "text", {}),
        ("sdxl", 3, synchronous(3), 3, "controlnet", {}),
        ("sdxl", 4, synchronous(2) | CFG, 1, "inpaint", {}),
        ("sdxl", 4, synchronous(4), 1, "text", {"height": 160, "width": 40}),
        ("sd15", 3, synchronous(3), 1, "image", {}),
        ("sd15", 4, synchronous(2) | DP, 2, "text", {"height": 128, "width": 64}),
    ],
)
def test_synchronous_distrifusion(pool, path_of, name, ranks, degrees, images, kind, changes):
    """Bands are uneven, and have a single row in the middle of the U-Net."""
    check(pool, path_of(name), ranks, degrees, images, kind, **changes)


def definition(path, edges, mode, warmup, **call):
    """What DistriFusion is defined to draw."""
    pipe = unets.loaded(path, "text")
    with displaced_unet.DisplacedUNet(pipe.unet, edges, mode, warmup).active():
        return unets.draw(path, None, **call)


ASYNCHRONOUS = [mode for mode in MODES if mode != "full_sync"]
EDGES = {2: [0, 12, 17], 3: [0, 8, 16, 17]}


@pytest.mark.parametrize(
    ("mode", "ranks", "warmup"),
    [*((mode, 2, 1) for mode in ASYNCHRONOUS), ("corrected_async_gn", 3, 0), ("stale_gn", 3, 2)],
)
def test_asynchronous_distrifusion(pool, path_of, mode, ranks, warmup):
    call = {"num_inference_steps": 4, "output_type": "latent"}
    expected = definition(path_of("sdxl"), EDGES[ranks], mode, warmup, **call)
    exact = unets.draw(path_of("sdxl"), None, **call)
    assert running.error(expected, exact) > 100 * running.TOLERANCE
    degrees = {"distrifusion_degree": ranks, "distrifusion_mode": mode, "warmup_steps": warmup}
    for result in pool.run(ranks, draw, path_of("sdxl"), degrees, (), call):
        assert running.error(result, expected) <= running.TOLERANCE


@pytest.mark.parametrize(
    ("degrees", "message"),
    [
        ({"ulysses_degree": 2}, "sequence parallelism .* does not serve UNet2DConditionModel: .* maps of several"),
        ({"pipefusion_parallel_degree": 2}, "PipeFusion does not serve UNet2DConditionModel: .* Use CFG, data"),
        ({"num_pipeline_patch": 2}, "PipeFusion does not serve"),
    ],
)
def test_methods_over_tokens_and_stages_are_refused_before_any_group(path_of, degrees, message):
    with pytest.raises(ValueError, match=message):
        xFuserArgs(model=path_of("sdxl"), **degrees).checked()
    engine_config, _ = xFuserArgs(**degrees).checked()
    with pytest.raises(ValueError, match=message):
        xDiTParallel(running.loaded(path_of("sdxl")), engine_config)
    assert not dist.is_initialized()
