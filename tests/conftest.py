"""Fixtures: the pool of ranks, and the folders of tiny pipelines."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import pytest
import tiny
import torch
from pool import RankPool


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
