"""Two nodes on one machine: network namespaces that are connected by one link."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import running
from PIL import Image

from xfuser.bench import nodes
from xfuser.config.args import SHIPPED_PIPELINE

ROOT = Path(__file__).parent.parent
possible = pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0 or not (shutil.which("ip") and shutil.which("tc")),
    reason="network namespaces need root, ip and tc",
)


@pytest.fixture
def two(monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    with nodes.two_nodes("1gbit") as made:
        yield made


PROMPT = "a red circle above a blue square"


@possible
@pytest.mark.matrix
def test_ranks_on_two_hosts_draw_what_one_process_draws(two, tmp_path):
    flags = ("--prompt", PROMPT, "--num_inference_steps", "2", "--ulysses_degree", "2")
    command = ("-m", "xfuser.cli", *flags, "--max_sequence_length", "31", "--output_dir", "drawn")
    started = nodes.torchrun(two, 1, *command, cwd=tmp_path)
    assert [process.wait(timeout=120) for process in started] == [0, 0]
    (drawn,) = (tmp_path / "drawn").iterdir()
    call = {"prompt": PROMPT, "num_inference_steps": 2, "guidance_scale": 3.5, "max_sequence_length": 31}
    call |= {"output_type": "np", "generator": running.torch.Generator().manual_seed(42)}
    expected = running.array(running.loaded(SHIPPED_PIPELINE)(**call))[0]
    assert np.abs(np.asarray(Image.open(drawn)) / 255 - expected).max() <= 1 / 255


DRAWING = """
from diffusers import DiffusionPipeline
from xfuser import xDiTParallel, xFuserArgs
from xfuser.config.args import SHIPPED_PIPELINE

pipe = DiffusionPipeline.from_pretrained(SHIPPED_PIPELINE)
pipe = xDiTParallel(pipe, *xFuserArgs(pipefusion_parallel_degree=2).create_config())
while True:
    pipe("a red circle", height=64, width=64, use_resolution_binning=False, num_inference_steps=2)
    print("done", flush=True)
"""
GATHERING = """
import torch
from xfuser.core.distributed import get_world_group, init_distributed_environment

init_distributed_environment()
while True:
    get_world_group().all_gather(torch.ones(10))
    print("done", flush=True)
"""


@possible
@pytest.mark.matrix
@pytest.mark.parametrize(("lost", "work"), [(0, GATHERING), (1, DRAWING)])
def test_a_host_that_is_lost_ends_the_other(two, tmp_path, lost, work):
    script = tmp_path / "endless.py"
    script.write_text(work)
    started = nodes.torchrun(two, 1, str(script), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while "done" not in started[1 - lost].stdout.readline():
        assert started[1 - lost].poll() is None, started[1 - lost].stderr.read()
    two[lost].kill()
    _, told = started[1 - lost].communicate(timeout=30)
    assert started[1 - lost].returncode == 1 and "failed" in told
    started[lost].communicate(timeout=30)


def namespaces():
    return subprocess.run(["ip", "netns"], capture_output=True, text=True).stdout


@possible
def test_what_was_made_is_removed_after_a_failure():
    with pytest.raises(RuntimeError, match="on the way"), nodes.two_nodes("100mbit") as (first, second):
        shown = subprocess.run(
            ["ip", "netns", "exec", second.namespace, "tc", "qdisc"], capture_output=True, text=True
        ).stdout
        assert f"dev {second.interface}" in shown and "rate 100Mbit" in shown
        left = second.start("cat", stdin=subprocess.PIPE)
        raise RuntimeError("on the way")
    assert left.wait(timeout=10) != 0
    assert first.namespace not in namespaces() and second.namespace not in namespaces()


@possible
def test_a_delay_that_the_kernel_does_not_know_leaves_nothing_behind():
    with pytest.raises(ValueError, match="netem delay often failed"), nodes.two_nodes("1gbit", "often"):
        pass
    assert f"xdit-{os.getpid()}" not in namespaces()


def test_nodes_are_refused_without_root_or_programs(monkeypatch):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    with pytest.raises(ValueError, match="need ip and tc"):
        nodes.check_nodes()
    monkeypatch.setattr(shutil, "which", lambda name: name)
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    with pytest.raises(ValueError, match="need root"):
        nodes.check_nodes()


@pytest.mark.parametrize("rate", ["fast", "100", "0mbit", "1gbps"])
def test_rates_that_are_none_are_refused(rate):
    with pytest.raises(ValueError, match=f"rate='{rate}'"):
        nodes.bits_per_second(rate)
