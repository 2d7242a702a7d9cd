"""Random cases: every rank skips what serial skips, and the result is the same.

``CACHING_CASES=500 pytest tests/test_caching_random.py`` runs 500 cases.
"""

import math
import os

import caches
from hypothesis import HealthCheck, assume, given, settings, strategies as st

from xfuser.testing import matrix

CASES = int(os.environ.get("CACHING_CASES", "6"))
CFG, DP, ULYSSES, RING, TENSOR = (
    "use_cfg_parallel", "data_parallel_degree", "ulysses_degree", "ring_degree", "tensor_parallel_degree",
)  # fmt: skip
PRODUCTS = [
    {ULYSSES: 2}, {RING: 2}, {ULYSSES: 3}, {RING: 4}, {ULYSSES: 2, RING: 2}, {CFG: True}, {DP: 2}, {DP: 3},
    {CFG: True, DP: 2}, {CFG: True, ULYSSES: 2}, {DP: 2, RING: 2}, {TENSOR: 2}, {TENSOR: 2, CFG: True},
    {"distrifusion_degree": 2, "distrifusion_mode": "full_sync"},
]  # fmt: skip
SIZED = st.builds(
    "{} {}x{}".format, st.sampled_from(["pixart", "wan", "cogview4"]), *[st.sampled_from([6, 10, 14])] * 2
)
FIXED = st.sampled_from(["flux", "qwen_image", "hunyuan_video", "ltx", "cogvideox", "mochi", "dit"])
MAG = {"mag_ratios": [1.0, 1.1, 0.9, 1.05, 0.95], "num_inference_steps": 5, "threshold": 0.12}
PYRAMID = {"spatial_attention_block_skip_range": 2}
COUNTING = {"MagCacheConfig": MAG, "PyramidAttentionBroadcastConfig": PYRAMID}


@settings(max_examples=CASES, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(data=st.data())
def test_all_ranks_skip_what_serial_skips(pool, data):
    family, degrees = data.draw(st.one_of(SIZED, FIXED)), data.draw(st.sampled_from(PRODUCTS))
    call = {
        "images": data.draw(st.integers(1, 3)),
        "guidance": data.draw(st.sampled_from(["batched", "sequential", "none"])),
        "num_inference_steps": 5,
        "seed": data.draw(st.integers(0, 99)),
    }
    kind = data.draw(st.sampled_from(["FirstBlockCacheConfig"] * 4 + list(COUNTING)))
    # A cache with one state for both calls of a step is refused.
    assume(not (kind == "PyramidAttentionBroadcastConfig" and CFG in degrees and call["guidance"] == "sequential"))
    options = COUNTING.get(kind)
    if options is None:
        ratios = caches.draw(family, None, call, kind, {"threshold": 0.0})[2]
        near = data.draw(st.sampled_from([0.999, 1.001, 0.9, 1.1]))
        options = {"threshold": data.draw(st.sampled_from(ratios)) * near}
    latents, forwards, _ = caches.draw(family, None, call, kind, options)
    ranks = math.prod(2 if degree is True else degree for degree in degrees.values() if not isinstance(degree, str))
    for result, own, branch in pool.run(ranks, caches.draw, family, degrees, call, kind, options):
        assert own == caches.expected_forwards(forwards, degrees, call, branch)
        assert matrix.error(result, latents) <= matrix.TOLERANCE
