"""The server on Ray Serve: replicas of engines, one of which is killed."""

import os
import signal
import socket
from unittest.mock import MagicMock

import openai
import psutil
import pytest
import test_serve

from xfuser.testing.serving import until

FORKS = "from multiprocessing.forkserver"


@pytest.fixture(scope="module")
def cluster():
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0"}
    import ray
    from ray import serve

    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    ray.init(num_cpus=4, include_dashboard=False, object_store_memory=80 * 2**20, log_to_driver=False)
    serve.start(http_options={"host": "127.0.0.1", "port": port})
    yield openai.OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", max_retries=8, timeout=300)
    serve.shutdown()
    ray.shutdown()


def ranks():
    """Return the processes of all ranks by replica; they are forked from a process that the replica starts."""
    found = {}
    for process in psutil.Process().children(recursive=True):
        try:
            forking = process.parent()
            replica = forking.parent()
            forked = all(FORKS in " ".join(one.cmdline()) for one in (process, forking))
            if forked and "ray::" in " ".join(replica.cmdline()):
                found.setdefault(replica.pid, []).append(process.pid)
        except psutil.Error:
            continue
    return found


def deploy(**options):
    from ray import serve

    from xfuser.serve.ray_app import build

    serve.run(build({"height": test_serve.SIDE, "width": test_serve.SIDE} | options), name="xdit")


@pytest.mark.parametrize(("has", "needs"), [({"GPU": 4.0}, {"CPU": 2, "GPU": 2}), ({}, {"CPU": 2})])
def test_gpus_of_other_machines_are_asked_for(monkeypatch, has, needs):
    import ray

    from xfuser.serve import ray_app

    given = {}
    monkeypatch.setattr(ray, "is_initialized", lambda: True)
    monkeypatch.setattr(ray, "cluster_resources", lambda: {"CPU": 8.0} | has)
    monkeypatch.setattr(ray_app.serve, "deployment", lambda kind, **options: given.update(options) or MagicMock())
    ray_app.build({"ulysses_degree": 2})
    assert given["placement_group_bundles"] == [needs]
    assert given["ray_actor_options"] == {"num_cpus": 2, "num_gpus": needs.get("GPU", 0)}


@pytest.mark.matrix
def test_two_replicas_of_one_rank_one_of_them_killed(cluster):
    deploy(replicas=2)
    assert [len(pids) for pids in ranks().values()] == [1, 1]
    seeds = range(3)
    pictures = [test_serve.in_thread(test_serve.draw, cluster, seed=seed) for seed in seeds]
    for seed, picture in zip(seeds, pictures, strict=True):
        assert test_serve.same(picture.result(), test_serve.serial(seed=seed))
    first, (rank,) = next(iter(ranks().items()))
    os.kill(first, signal.SIGKILL)
    until(lambda: not psutil.pid_exists(rank), "the end of the killed replica's rank")
    assert test_serve.same(test_serve.draw(cluster, seed=7), test_serve.serial(seed=7))
    until(lambda: len(ranks()) == 2, "another replica")


@pytest.mark.matrix
def test_one_replica_of_two_ranks(cluster):
    deploy(replicas=1, ulysses_degree=2)
    until(lambda: [len(pids) for pids in ranks().values()] == [2], "one replica of two ranks")
    assert test_serve.same(test_serve.draw(cluster, seed=3), test_serve.serial(seed=3))
    with pytest.raises(openai.BadRequestError, match="multiples of 16"):
        test_serve.draw(cluster, size="100x64")
