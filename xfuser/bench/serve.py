"""``python -m xfuser.bench.serve``: send many requests to a server while killing ranks, and measure overheads."""

import argparse
import asyncio
import base64
import io
import math
import os
import random
import signal
import statistics
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import httpx
import numpy as np
import psutil
import torch
from PIL import Image

from xfuser.config import xFuserArgs
from xfuser.parallel import xDiTParallel
from xfuser.testing.faults import RAISES, faulty_pipeline
from xfuser.testing.serving import Served, until
from xfuser.weights.loading import load_pipeline

SHAPES, SEEDS, PROMPT = ((64, 64), (64, 128), (128, 64), (128, 128)), 4, "a red circle above a blue square"
INVALID = "100x64"  # invalid size
ROUNDS = 7
WARM = 100  # number of requests before the first reading of memory


@dataclass
class Account:
    """The outcomes of requests and faults."""

    ends: Counter = field(default_factory=Counter)
    wrong: int = 0
    killed: list[float] = field(default_factory=list)  # times
    recovered: list[float] = field(default_factory=list)  # seconds until ready again
    after_fault: list[float] = field(default_factory=list)  # seconds from a kill to the end of an affected request
    memory: list[int] = field(default_factory=list)  # bytes after WARM requests and at the end

    def __str__(self) -> str:
        told = ", ".join(f"{name} {count}" for name, count in sorted(self.ends.items()))
        lines = [f"{self.ends.total()} requests ended: {told}; wrong images: {self.wrong}"]
        lines.append(f"kills: {len(self.killed)}; ready again after {_spread(self.recovered)} s")
        lines.append(f"running requests ended {_spread(self.after_fault)} s after the kill")
        if len(self.memory) == 2:
            lines.append(f"memory at the end: {self.memory[1] / self.memory[0]:.2f} of that behind {WARM} requests")
        return "\n".join(lines)


def main() -> None:
    """Run the requests and faults, and print the outcomes and overheads."""
    flags = argparse.ArgumentParser(prog="python -m xfuser.bench.serve", description=__doc__)
    flags.add_argument("--requests", type=int, default=2000)
    flags.add_argument("--kills", type=int, default=10)
    flags.add_argument("--exceptions", type=int, default=10)
    flags.add_argument("--clients", type=int, default=8)
    flags.add_argument("--steps", type=int, default=2)
    flags.add_argument("--ranks", type=int, default=2)
    flags.add_argument("--elastic", action="store_true")
    options = flags.parse_args()
    pipe, inputs = bare_pipeline(options.steps)
    with tempfile.TemporaryDirectory() as folder:
        model = ["--model", faulty_pipeline(folder), "--trust_remote_code", "--no_use_resolution_binning"]
        model += ["--num_inference_steps", options.steps]
        elastic = ["--elastic"] if options.elastic else []
        served = Served(folder, *model, "--ulysses_degree", options.ranks, *elastic).ready()
        try:
            start, faults = time.monotonic(), (options.kills, options.exceptions)
            account = asyncio.run(
                fault_run(served, serial_pictures(pipe, inputs), options.requests, *faults, options.clients)
            )
            print(
                f"{options.ranks} ranks, {time.monotonic() - start:.0f} s, {options.requests} requests\n{account}",
                flush=True,
            )
        finally:
            served.interrupt()
        served = Served(folder, *model).ready()
        try:
            for side in (SHAPES[0][0], 256):
                asyncio.run(costs(served, pipe, inputs, side))
        finally:
            served.interrupt()


def bare_pipeline(steps: int) -> tuple[Any, dict[str, Any]]:
    """The shipped pipeline in this process, and its call's arguments except size and generator."""
    args = xFuserArgs("shapes-256", prompt=PROMPT, num_inference_steps=steps, no_use_resolution_binning=True)
    configs = args.create_config()
    parallel = xDiTParallel(load_pipeline(*configs), *configs)
    call = {name: value for name, value in parallel.call_arguments().items() if name not in ("height", "width")}
    pipe = parallel.unwrap()
    pipe.set_progress_bar_config(disable=True)
    return pipe, call


def drawn(pipe: Any, call: dict[str, Any], shape: tuple[int, int], seed: int) -> np.ndarray:
    """Generate an image with the bare pipeline."""
    own = {"width": shape[0], "height": shape[1], "generator": torch.Generator().manual_seed(seed)}
    return np.asarray(pipe(**call | own).images[0], np.int16)


def serial_pictures(pipe: Any, call: dict[str, Any]) -> dict[tuple, np.ndarray]:
    """The bare pipeline's images by shape and seed."""
    return {(shape, seed): drawn(pipe, call, shape, seed) for shape in SHAPES for seed in range(SEEDS)}


async def fault_run(
    served: Served, expected: dict[tuple, np.ndarray], requests: int, kills: int, exceptions: int, clients: int
) -> Account:
    """Send requests from concurrent clients, with faults in between; returns only when every request has ended."""
    account, choose = Account(), random.Random(0)
    kinds = ["cancelled"] * math.ceil(0.05 * requests) + ["invalid"] * math.ceil(0.03 * requests)
    kinds += ["raises"] * exceptions
    kinds += ["picture"] * (requests - len(kinds))
    choose.shuffle(kinds)
    spacing = requests // (kills + 1)
    waiting = iter(enumerate(kinds))

    async def client_loop(client: httpx.AsyncClient) -> None:
        for number, kind in waiting:
            if number == WARM:
                account.memory.append(memory_of(served))
            if kills and number and number % spacing == 0 and len(account.killed) < kills:
                pids = served.ranks()
                if pids:
                    os.kill(choose.choice(pids), signal.SIGKILL)
                    account.killed.append(time.monotonic())
                    recoveries.append(asyncio.ensure_future(_recovery(served, account)))
            await request(client, kind, choose, account, expected)

    recoveries: list[Any] = []
    async with httpx.AsyncClient(base_url=served.url, timeout=600) as client:
        await asyncio.gather(*(client_loop(client) for _ in range(clients)))
    await asyncio.gather(*recoveries)
    account.memory.append(memory_of(served))
    return account


async def request(client: httpx.AsyncClient, kind: str, choose: Any, account: Account, expected: Any) -> None:
    """Send one request and wait for its end; retry while the server is not ready."""
    shape, seed = choose.choice(SHAPES), choose.randrange(SEEDS)
    body = {"prompt": PROMPT, "seed": seed, "size": INVALID if kind == "invalid" else "{}x{}".format(*shape)}
    if kind == "raises":
        body["num_inference_steps"] = RAISES
    while True:
        if kind == "cancelled":
            name = await _leave(client, body)
        else:
            answer = await client.post("/v1/images/generations", json=body)
            name = "ok" if answer.status_code == 200 else answer.json()["error"]["code"]
        if name != "not_ready":
            break
        await asyncio.sleep(0.1)
    account.ends[f"{kind}: {name}"] += 1
    if name == "engine_restarted":
        account.after_fault.append(time.monotonic() - account.killed[-1])
    if name == "ok":
        data = base64.b64decode(answer.json()["data"][0]["b64_json"])
        picture = np.asarray(Image.open(io.BytesIO(data)), np.int16)
        wanted = expected[shape, seed]
        account.wrong += picture.shape != wanted.shape or int(np.abs(picture - wanted).max()) > 1


async def _leave(client: httpx.AsyncClient, body: dict[str, Any]) -> str:
    """Request events, and disconnect at the first one."""
    async with client.stream("POST", "/v1/images/generations", json=body | {"stream": True}) as answer:
        if answer.status_code != 200:
            await answer.aread()
            return answer.json()["error"]["code"]
        async for _ in answer.aiter_lines():
            return "left"
    return "ended"


async def _recovery(served: Served, account: Account) -> None:
    """Record the time until the server is ready again."""
    start = account.killed[-1]
    await asyncio.to_thread(until, lambda: not served.health()["ready"], "a server that notices")
    await asyncio.to_thread(served.ready)
    account.recovered.append(time.monotonic() - start)


def memory_of(served: Served) -> int:
    """Resident bytes of the HTTP process and its ranks."""
    return sum(psutil.Process(pid).memory_info().rss for pid in (served.process.pid, *served.ranks()))


async def costs(served: Served, pipe: Any, call: dict[str, Any], side: int, clients: int = 8) -> None:
    """Measure a request's overhead over a call, and the gain of batching; compared runs are interleaved."""
    overheads, gains = [], []
    body = {"prompt": PROMPT, "seed": 0, "size": f"{side}x{side}"}
    async with httpx.AsyncClient(base_url=served.url, timeout=600) as client:

        async def post() -> None:
            (await client.post("/v1/images/generations", json=body)).raise_for_status()

        for _ in range(ROUNDS):
            start = time.perf_counter()
            drawn(pipe, call, (side, side), 0)
            between = time.perf_counter()
            await post()
            overheads.append(time.perf_counter() - between - (between - start))
        for _ in range(ROUNDS):
            start = time.perf_counter()
            for _ in range(clients):
                await post()
            between = time.perf_counter()
            await asyncio.gather(*(post() for _ in range(clients)))
            gains.append((between - start) / (time.perf_counter() - between))
    print(f"{side} pixels, one rank: a request beside pipe(...): {1000 * statistics.median(overheads):+.0f} ms")
    print(f"{side} pixels, one rank: {clients} clients beside one after the other: {statistics.median(gains):.2f} x")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.1f} (at most {max(values):.1f})" if values else "-"


if __name__ == "__main__":
    main()
