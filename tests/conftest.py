"""Fixtures: the pool of ranks, and the folders of tiny pipelines."""

import os
from collections import Counter

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import tiny
import torch

from xfuser.testing.faults import faulty_pipeline
from xfuser.testing.ranks import RankPool
from xfuser.testing.serving import Served


def pytest_addoption(parser):
    parser.addoption("--matrix", action="store_true", help="run every class under every method")


@pytest.hookimpl(tryfirst=True)
def pytest_cmdline_main(config):
    """With pytest-xdist, run test files in parallel, unless ``-n`` is set or a test is named."""
    alone = hasattr(config, "workerinput") or config.option.usepdb or any("::" in one for one in config.args)
    if config.pluginmanager.hasplugin("xdist") and config.option.numprocesses is None and not alone:
        config.option.numprocesses, config.option.dist = min(2, os.cpu_count() or 1), "loadfile"


MANY, SAMPLE = 5, 8  # of a test with more than MANY cases, run every SAMPLE-th, unless all are requested


def pytest_collection_modifyitems(config, items):
    """Without ``--matrix``, skip the cells of the matrix, and run a sample of the cases of tests with many."""
    if config.getoption("--matrix") or any("::" in argument for argument in config.args):
        return
    cases = Counter()
    kept = [item for item in items if not item.get_closest_marker("matrix")]
    many = Counter(item.function for item in kept)
    sampled = []
    for item in kept:
        number = cases[item.function] = cases[item.function] + 1
        if many[item.function] <= MANY or item.get_closest_marker("covering") or number % SAMPLE == 1:
            sampled.append(item)
    config.hook.pytest_deselected(items=[item for item in items if item not in set(sampled)])
    items[:] = sampled


@pytest.fixture(scope="session")
def pool():
    torch.set_num_threads(1)
    ranks = RankPool(4)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """Return a function from a family's name to the folder of its tiny pipeline."""
    root = tmp_path_factory.mktemp("pipelines")
    return lambda family, attentive=False: tiny.save(family, root, attentive)


@pytest.fixture(scope="session")
def elastic_served(tmp_path_factory):
    """A server with two ranks that runs each call on one or both of them."""
    folder = tmp_path_factory.mktemp("elastic")
    flags = ["--model", faulty_pipeline(str(folder)), "--trust_remote_code", "--no_use_resolution_binning"]
    flags += ["--elastic", "--ulysses_degree", 2, "--height", 128, "--width", 128, "--num_inference_steps", 3]
    server = Served(folder, *flags)
    yield server
    server.process.kill()
    server.process.wait()
