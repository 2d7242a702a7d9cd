"""Caches under every method: all ranks skip what one rank skips, and the image is the same."""

import caches
import pytest
import torch

from xfuser.models.teacache import TEACACHE
from xfuser.testing import matrix

BATCHED, SEQUENTIAL = "batched", "sequential"
METHODS = {
    "ulysses2": (2, {"ulysses_degree": 2}),
    "ring3": (3, {"ring_degree": 3}),
    "ulysses2 x ring2": (4, {"ulysses_degree": 2, "ring_degree": 2}),
    "cfg2": (2, {"use_cfg_parallel": True}),
    "dp2": (2, {"data_parallel_degree": 2}),
    "dp3": (3, {"data_parallel_degree": 3}),
    "cfg2 x dp2": (4, {"use_cfg_parallel": True, "data_parallel_degree": 2}),
    "cfg2 x ulysses2": (4, {"use_cfg_parallel": True, "ulysses_degree": 2}),
    "tensor2": (2, {"tensor_parallel_degree": 2}),
    "fsdp2": (2, {"ulysses_degree": 2, "fully_shard_degree": 2}),
}
STEPS = 7


def ratios_of(family, call):
    return sorted(caches.draw(family, None, call, "FirstBlockCacheConfig", {"threshold": 0.0})[2])


def check(pool, family, method, call, kind, options, behind_wrap=False):
    ranks, degrees = METHODS[method]
    latents, forwards, _ = caches.draw(family, None, call, kind, options)
    skipping = {len(names) for _, names in forwards}
    assert len(skipping) > 1, f"all forwards ran {skipping} modules"
    for result, own, branch in pool.run(ranks, caches.draw, family, degrees, call, kind, options, behind_wrap):
        assert own == caches.expected_forwards(forwards, degrees, call, branch)
        assert matrix.error(result, latents) <= matrix.TOLERANCE


FIRST_BLOCK = [
    ("flux", "ulysses2", SEQUENTIAL, 1),
    ("flux", "cfg2 x ulysses2", SEQUENTIAL, 3),
    ("flux", "cfg2 x dp2", BATCHED, 1),
    ("flux", "cfg2 x dp2", "none", 3),
    ("pixart", "dp3", BATCHED, 2),
    ("pixart", "ulysses2 x ring2", BATCHED, 1),
    ("qwen_image", "cfg2", BATCHED, 3),
    ("wan", "cfg2", SEQUENTIAL, 1),
    ("cogvideox", "ring3", BATCHED, 1),
    ("flux", "tensor2", BATCHED, 1),
]


@pytest.mark.parametrize(("family", "method", "guidance", "images"), FIRST_BLOCK)
def test_first_block_cache_decides_as_one_rank(pool, family, method, guidance, images):
    call = {"images": images, "num_inference_steps": STEPS, "guidance": guidance}
    ratios = ratios_of(family, call)
    check(pool, family, method, call, "FirstBlockCacheConfig", {"threshold": ratios[len(ratios) // 2] * 1.001})


MAG = ("MagCacheConfig", {"mag_ratios": [1.0, 1.1, 0.9, 1.0, 1.0, 0.95, 1.0], "num_inference_steps": STEPS})
TAYLOR = (
    "TaylorSeerCacheConfig",
    {"cache_interval": 2, "disable_cache_before_step": 2, "taylor_factors_dtype": torch.float32},
)
LITE = ("TaylorSeerCacheConfig", TAYLOR[1] | {"use_lite_mode": True})
PYRAMID = ("PyramidAttentionBroadcastConfig", {"spatial_attention_block_skip_range": 2})
FASTER = ("FasterCacheConfig", {"tensor_format": "BCFHW"})
COUNTING = [
    ("flux", "ulysses2", SEQUENTIAL, 1, MAG),
    ("flux2", "ring3", SEQUENTIAL, 1, MAG),
    ("sd3", "cfg2 x dp2", BATCHED, 3, MAG),
    ("wan", "cfg2", SEQUENTIAL, 1, MAG),
    ("flux", "ulysses2 x ring2", SEQUENTIAL, 1, TAYLOR),
    ("qwen_image", "cfg2 x ulysses2", SEQUENTIAL, 1, TAYLOR),
    ("sd3", "dp3", BATCHED, 2, TAYLOR),
    ("flux", "ring3", SEQUENTIAL, 1, LITE),
    ("pixart", "cfg2 x ulysses2", BATCHED, 1, PYRAMID),
    ("hunyuan_video", "ulysses2", SEQUENTIAL, 1, PYRAMID),
    ("wan", "dp2", "none", 3, PYRAMID),
    ("wan", "ulysses2", BATCHED, 1, FASTER),
    ("flux", "tensor2", BATCHED, 1, PYRAMID),
]


@pytest.mark.parametrize(("family", "method", "guidance", "images", "cache"), COUNTING)
def test_caches_that_count_steps_count_as_on_one_rank(pool, family, method, guidance, images, cache):
    check(pool, family, method, {"images": images, "num_inference_steps": STEPS, "guidance": guidance}, *cache)


@pytest.mark.parametrize("cache", [MAG, TAYLOR, PYRAMID, ("FirstBlockCacheConfig", {"threshold": 0.45})])
def test_sharded_weights_cached_behind_the_wrap(pool, cache):
    call = {"images": 1, "num_inference_steps": STEPS, "guidance": SEQUENTIAL}
    check(pool, "flux", "fsdp2", call, *cache, behind_wrap=True)


FLUX = TEACACHE["FluxTransformer2DModel"][0].coefficients
STAGES = [
    (1, {}, 2, 1),
    (2, {"pipefusion_parallel_degree": 2}, 3, 2),
    (4, {"pipefusion_parallel_degree": 4}, 2, 1),
    (4, {"pipefusion_parallel_degree": 2, "ulysses_degree": 2}, 2, 1),
    (4, {"pipefusion_parallel_degree": 2, "use_cfg_parallel": True}, 3, 1),
    (4, {"pipefusion_parallel_degree": 2, "data_parallel_degree": 2}, 3, 1),
]


def check_flagged(pool, family, ranks, flags, call, expected, skipped):
    assert {*skipped.values()} == {True, False}
    for rank, results in enumerate(pool.run(ranks, caches.draw_flagged, family, flags, call)):
        for latents, own in results:
            if rank == 0 and flags.get("use_fbcache") and flags.get("pipefusion_parallel_degree") == 4:
                assert not any(own.values())  # this stage has only the first block
            else:
                assert own.items() <= skipped.items()
            assert len(own) == len(skipped) or flags.get("use_cfg_parallel")
            assert matrix.error(latents, expected) <= matrix.TOLERANCE


@pytest.mark.parametrize(("ranks", "degrees", "patches", "warmup"), STAGES)
@pytest.mark.parametrize(("flag", "threshold"), [("use_fbcache", 0.45), ("use_teacache", 1.0)])
def test_stages_skip_what_the_definition_says(pool, ranks, degrees, patches, warmup, flag, threshold):
    images = 3 if "data_parallel_degree" in degrees else 1
    call = {"images": images, "num_inference_steps": STEPS, "guidance": SEQUENTIAL}
    rule = (threshold,) if flag == "use_fbcache" else (threshold, FLUX, STEPS)
    expected, skipped = caches.oracle_of("flux", call, patches, warmup, *rule)
    flags = degrees | {"num_pipeline_patch": patches, "warmup_steps": warmup, flag: True, "cache_threshold": threshold}
    check_flagged(pool, "flux", ranks, flags, call, expected, skipped)


TEA = [
    ("flux", {"ring_degree": 3}, 3, SEQUENTIAL),
    ("flux", {"ulysses_degree": 2, "use_cfg_parallel": True}, 4, SEQUENTIAL),
    ("flux", {"ulysses_degree": 2, "fully_shard_degree": 2}, 2, SEQUENTIAL),
    ("mochi", {"ulysses_degree": 2}, 2, BATCHED),
    ("cogvideox", {"data_parallel_degree": 2}, 2, BATCHED),
    ("hunyuan_video t2v", {"tensor_parallel_degree": 2}, 2, "none"),
    ("ltx", {"ulysses_degree": 3}, 3, BATCHED),
    ("wan 1.3B", {"ulysses_degree": 2}, 2, SEQUENTIAL),
]
TEA_THRESHOLDS = {
    "flux": 1.0, "mochi": 1.0, "cogvideox": 1.0, "hunyuan_video t2v": 50.0, "ltx": 0.5, "wan 1.3B": 1e9,
}  # fmt: skip


@pytest.mark.parametrize(("family", "degrees", "ranks", "guidance"), TEA)
def test_teacache_decides_as_one_rank(pool, family, degrees, ranks, guidance):
    call = {"images": 1, "num_inference_steps": STEPS, "guidance": guidance}
    threshold = TEA_THRESHOLDS[family]
    flags = {"use_teacache": True, "cache_threshold": threshold}
    (serial,) = pool.run(1, caches.draw_flagged, family, flags, call)
    (expected, skipped), again = serial
    assert matrix.error(again[0], expected) == 0 and again[1] == skipped and any(skipped.values())
    if family == "flux":
        by_oracle, of_oracle = caches.oracle_of(family, call, 1, 1, threshold, FLUX, STEPS)
        assert skipped == of_oracle and matrix.error(expected, by_oracle) <= matrix.TOLERANCE
    check_flagged(pool, family, ranks, flags | degrees, call, expected, skipped)


TOGETHER = [
    ("flux", 2, 1, "use_fbcache", 0.45),
    ("flux", 2, 1, "use_teacache", 1.0),
    ("pixart", 3, 2, "use_fbcache", 0.25),
]


@pytest.mark.parametrize(("family", "ranks", "warmup", "flag", "threshold"), TOGETHER)
def test_parts_decide_together(pool, family, ranks, warmup, flag, threshold):
    call = {"images": 1, "num_inference_steps": STEPS, "guidance": BATCHED if family == "pixart" else SEQUENTIAL}
    rule = (threshold,) if flag == "use_fbcache" else (threshold, FLUX, STEPS)
    expected, skipped = caches.joint_oracle_of(family, call, ranks, warmup, *rule)
    flags = {"distrifusion_degree": ranks, "warmup_steps": warmup, flag: True, "cache_threshold": threshold}
    check_flagged(pool, family, ranks, flags, call, expected, skipped)
