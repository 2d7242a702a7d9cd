"""Fixtures: the pool of ranks, and the folders of tiny pipelines."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import tiny
import torch

from xfuser.testing.ranks import RankPool


def pytest_addoption(parser):
    parser.addoption("--matrix", action="store_true", help="run every class under every method")


def pytest_collection_modifyitems(config, items):
    if not config.getoption("--matrix"):
        left = [item for item in items if item.get_closest_marker("matrix")]
        config.hook.pytest_deselected(items=left)
        items[:] = [item for item in items if item not in set(left)]


@pytest.fixture(scope="session")
def pool():
    torch.set_num_threads(1)
    ranks = RankPool(4)
    yield ranks
    ranks.close()


@pytest.fixture(scope="session")
def folder_of(tmp_path_factory):
    """From a family's name to the folder of its tiny pipeline."""
    root = tmp_path_factory.mktemp("pipelines")
    return lambda family, attentive=False: tiny.save(family, root, attentive)
