"""The same server as a Ray Serve deployment: ``serve run xfuser.serve.ray_app:build ulysses_degree=2 replicas=2``."""

import asyncio
from argparse import Namespace

import ray
from fastapi import FastAPI
from ray import serve
from ray.serve import Application

from xfuser.config import xFuserArgs
from xfuser.core import device as devices
from xfuser.serve.app import create_app
from xfuser.serve.command import check, parsed
from xfuser.serve.engine import POLL
from xfuser.serve.server import Server


@serve.ingress()
class Replica:
    """One engine with its ranks, on one machine; ready when the ranks are.

    Args:
        args, options: the flags of ``xdit serve``.
        alone: whether this is the only replica.
    """

    async def __init__(self, args: xFuserArgs, options: Namespace, alone: bool) -> None:
        server = Server(args, options)
        self._engine, self._task = server.engine, asyncio.create_task(server.engine.run())
        self._app = await asyncio.to_thread(create_app, server, alone)
        while self._engine.why and not self._task.done():
            await asyncio.sleep(POLL)
        self.check_health()

    async def __del__(self) -> None:
        self._task.cancel()
        await asyncio.wait([self._task])

    def __serve_build_asgi_app__(self) -> FastAPI:
        return self._app

    def check_health(self) -> None:
        """Raise a RuntimeError if the ranks do not start; Ray then creates another replica."""
        if self._engine.failed:
            raise RuntimeError(self._engine.why)


def build(options: dict[str, str]) -> Application:
    """Build the application with ``replicas`` engines; all other options are flags of ``xdit serve``.

    Raises:
        ValueError: a flag is invalid; raised on the machine that deploys.
    """
    replicas = int(options.get("replicas", 1))
    flags = {name: str(value) for name, value in options.items() if name != "replicas"}
    arguments = [f"--{name}" + (f"={value}" if value.lower() != "true" else "") for name, value in flags.items()]
    args, own = parsed(arguments)
    check(args, own)
    ranks = args.checked()[0].world_size
    # The machine that deploys may have no accelerator, or hide them: within Ray, all machines count.
    has_gpus = devices.device_type() != "cpu" or (ray.is_initialized() and "GPU" in ray.cluster_resources())
    needs = {"CPU": ranks, "GPU": ranks} if has_gpus else {"CPU": ranks}
    deployment = serve.deployment(
        Replica,
        num_replicas=replicas,
        max_ongoing_requests=own.max_queue,
        ray_actor_options={"num_cpus": ranks, "num_gpus": needs.get("GPU", 0)},
        placement_group_bundles=[needs],  # one bundle, as the ranks of a replica must be on one machine
        placement_group_strategy="STRICT_PACK",
    )
    return deployment.bind(args, own, replicas == 1)
