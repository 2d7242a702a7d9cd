"""Every family under every method equals the bare pipeline with the same seed, on awkward shapes."""

from functools import cache

import pytest
import running
import tiny

METHODS = {
    "dp2": (2, {"data_parallel_degree": 2}),
    "cfg2": (2, {"use_cfg_parallel": True}),
    "ulysses2": (2, {"ulysses_degree": 2}),
    "ring2": (2, {"ring_degree": 2}),
    "ulysses2-ring2": (4, {"ulysses_degree": 2, "ring_degree": 2}),
    "cfg2-ulysses2": (4, {"use_cfg_parallel": True, "ulysses_degree": 2}),
    "dp2-ring2": (4, {"data_parallel_degree": 2, "ring_degree": 2}),
    "dp2-cfg2": (4, {"data_parallel_degree": 2, "use_split_batch": True}),
    "ulysses4": (4, {"ulysses_degree": 4}),
    "ring4": (4, {"ring_degree": 4}),
    "one-rank": (1, {}),
}


@cache
def reference(path, call, scheduler=None):
    return running.bare(path, dict(call), scheduler)


def check(pool, path, method, call, scheduler=None):
    ranks, degrees = METHODS[method]
    expected = running.bare(path, call, scheduler)
    for result in pool.run(ranks, running.wrapped, path, degrees, call, scheduler):
        assert running.error(result, expected) <= running.TOLERANCE


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_family_under_method(pool, folder_of, family, method):
    images = 3 if "dp" in method else 1
    check(pool, folder_of(family), method, tiny.call_of(family, images))


@pytest.mark.parametrize("method", ["cfg2", "ulysses2-ring2", "dp2-cfg2"])
@pytest.mark.parametrize("family", tiny.FAMILIES)
def test_batch_of_three(pool, folder_of, family, method):
    check(pool, folder_of(family), method, tiny.call_of(family, 3, num_inference_steps=2))
