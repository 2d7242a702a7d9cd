"""The host cost of a wrapped block: microseconds on top of the bare block, with collectives that return at once.

On a fast GPU the host is the limit: it must issue the operators of a block faster than the GPU runs them. Here a Flux
transformer runs on one thread, bare and wrapped, with blocks so small that their computation takes almost no time. The
``fake`` process group of torch, whose collectives return at once without an exchange, stands in for the other ranks.
"""

import importlib
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from xfuser.bench.report import describe, describe_machine
from xfuser.config import xFuserArgs
from xfuser.core.logger import quiet_libraries
from xfuser.models.plan import blocks_of
from xfuser.models.registry import plan_of
from xfuser.parallel import parallelize
from xfuser.planner.rehearsal import alone_of
from xfuser.testing.ranks import own_parallelism_runs_here

DEGREES = {
    "Ulysses 2": {"ulysses_degree": 2},
    "ring 2": {"ring_degree": 2},
    "Ulysses 2 x ring 2": {"ulysses_degree": 2, "ring_degree": 2},
    "tensor 2": {"tensor_parallel_degree": 2},
    "PipeFusion, a stage of 2": {"pipefusion_parallel_degree": 2},
}
DOUBLE, SINGLE = 19, 38  # blocks of Flux.1
IMAGE, TEXT = (6, 8), 16  # tokens: rows and columns, and text; even, as Diffusers requires


def build() -> nn.Module:
    """A transformer with as many blocks as Flux.1, each of them tiny."""
    from diffusers import FluxTransformer2DModel

    torch.manual_seed(0)
    model = FluxTransformer2DModel(
        in_channels=16, num_layers=DOUBLE, num_single_layers=SINGLE, attention_head_dim=16, num_attention_heads=4,
        joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6), guidance_embeds=False,
    )  # fmt: skip
    return model.eval()


def inputs() -> dict[str, torch.Tensor]:
    """The arguments of a forward."""
    rows, columns = IMAGE
    grid = torch.cartesian_prod(torch.arange(1), torch.arange(rows), torch.arange(columns)).float()
    return {
        "hidden_states": torch.randn(1, rows * columns, 16),
        "encoder_hidden_states": torch.randn(1, TEXT, 32),
        "pooled_projections": torch.randn(1, 32),
        "timestep": torch.tensor([0.5]),
        "img_ids": grid,
        "txt_ids": torch.zeros(TEXT, 3),
    }


def seconds(model: nn.Module, scheduler: Any, forwards: int) -> list[float]:
    """Seconds of each of ``forwards`` forwards in a denoising loop, after two warm-up steps that are not counted."""
    found, arguments = [], inputs()
    scheduler.set_timesteps(sigmas=[1 - step / (forwards + 2) for step in range(forwards + 2)])
    latents = arguments["hidden_states"]
    with torch.no_grad():
        for timestep in scheduler.timesteps:
            start = time.perf_counter()
            noise = model(**arguments, return_dict=False)[0]
            found.append(time.perf_counter() - start)
            latents = scheduler.step(noise, timestep, latents, return_dict=False)[0]
    return found[-forwards:]


@contextmanager
def wrapped(degrees: dict[str, int]) -> Iterator[tuple[nn.Module, Any, int]]:
    """Context with a wrapped model, its scheduler, and the number of blocks that the first rank computes."""
    from diffusers import FlowMatchEulerDiscreteScheduler

    args = xFuserArgs(**degrees, warmup_steps=0)
    with alone_of(math.prod(degrees.values())):
        parallel = parallelize(build(), None, args.create_config()[0], FlowMatchEulerDiscreteScheduler())
        blocks = blocks_of(parallel.transformer, plan_of(parallel.transformer))
        own = sum(1 for block in blocks if any(True for _ in block.module.parameters()))
        with parallel.active():
            yield parallel.transformer, parallel.scheduler, own


@contextmanager
def diffusers_own() -> Iterator[tuple[nn.Module, Any, int]]:
    """Like :func:`wrapped`, with Diffusers' own Ulysses."""
    import diffusers

    model = build()
    with alone_of(2), own_parallelism_runs_here():
        model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=2))
        yield model, diffusers.FlowMatchEulerDiscreteScheduler(), DOUBLE + SINGLE


def measure(rounds: int, forwards: int = 5) -> dict[str, float]:
    """Microseconds per block on top of the bare block, by configuration; under ``"bare"``, those of the bare block.

    The minimum over all forwards is used, as other work on the machine can only add time. Rounds are interleaved.
    """
    from diffusers import FlowMatchEulerDiscreteScheduler

    contenders = {name: partial(wrapped, degrees) for name, degrees in DEGREES.items()}
    if hasattr(importlib.import_module("diffusers"), "ContextParallelConfig"):
        contenders["Diffusers' Ulysses 2"] = diffusers_own
    bare, scheduler = build(), FlowMatchEulerDiscreteScheduler()
    best = {"bare": math.inf} | dict.fromkeys(contenders, math.inf)
    blocks = dict.fromkeys(best, DOUBLE + SINGLE)
    for _ in range(rounds):
        for name, contender in contenders.items():
            best["bare"] = min(best["bare"], *seconds(bare, scheduler, forwards))
            with contender() as (model, its_scheduler, blocks[name]):
                best[name] = min(best[name], *seconds(model, its_scheduler, forwards))
    per_block = {name: 1e6 * least / blocks[name] for name, least in best.items()}
    return {name: cost - per_block["bare"] * (name != "bare") for name, cost in per_block.items()}


def run(rounds: int) -> int:
    """Print the table."""
    torch.set_num_threads(1)
    with quiet_libraries():
        found = measure(rounds)
    print(describe(describe_machine()))
    print(f"bare block: {found.pop('bare'):.0f} us. On top of it, us a block:")
    for name, cost in found.items():
        print(f"{name:26}{cost:6.0f}")
    return 0
