"""``--elastic``: run each call on the number of ranks that finishes it soonest; every rank has all weights."""

import math
from collections.abc import Awaitable, Callable
from dataclasses import replace
from functools import partial
from typing import Any

from PIL import Image

from xfuser.config import EngineConfig, InputConfig, ParallelConfig
from xfuser.config.config import DEGREES
from xfuser.pipeline_io.media import png
from xfuser.serve.jobs import Job

METHODS = ("cfg", "ulysses", "ring", "dp")  # of a team; smaller teams keep the first ones longest
SIDE = 512  # pixels, if neither the request nor a flag sets them
SOON = 0.001  # seconds left to assume for a call that takes longer than predicted
LOOKED_AT = 32  # maximum number of calls to place at a time
ROUNDS, STEPS = 3, 2  # of startup measurements: calls per size, the first not counted; steps per call

Measured = dict[int, list[tuple[int, float]]]  # by number of ranks: pixels and seconds of a step, of two sizes


def check(config: EngineConfig) -> None:
    """Raise a ValueError unless every number of ranks that divides the world size can generate the same image."""
    parallel = config.parallel_config
    flags = {names.flag: getattr(parallel, names.field) for name, names in DEGREES.items() if name not in METHODS}
    flags |= {name: getattr(parallel, name) for name in ("fully_shard_degree", "num_pipeline_patch")}
    flags["text_encoder"] = config.runtime_config.text_encoder
    given = [f"{flag}={value}" for flag, value in flags.items() if value not in (1, "replicate")]
    allowed = ", ".join(DEGREES[name].flag for name in METHODS)
    if given:
        told = f"elastic requires all weights on every rank, and the same image on any number of ranks: {given[0]}"
        raise ValueError(f"{told} is not supported with it; remove one of them. Supported are {allowed}")
    if config.world_size == 1:
        raise ValueError(f"elastic requires more than one rank: give {allowed}, or remove it")


def sizes_of(world_size: int, elastic: bool) -> list[int]:
    """The numbers of ranks on which a call may run."""
    return [size for size in range(1, world_size + 1) if world_size % size == 0 and (elastic or size == world_size)]


def degrees_of(parallel: ParallelConfig, size: int) -> ParallelConfig:
    """The degrees of a team of this many ranks: divisors of the degrees of all ranks."""
    if size == parallel.world_size:
        return parallel
    degrees = {}
    for name in METHODS:
        field = DEGREES[name].field
        degrees[field] = math.gcd(size, getattr(parallel, field))
        size //= degrees[field]
    return replace(parallel, **degrees)


async def measure(
    draw: Callable[[Job], Awaitable[float]], abilities: dict[str, Any], sizes: list[int], inputs: InputConfig
) -> Measured:
    """Measure the seconds of a step on each number of ranks with enough memory, at half the default sides and at the
    default sides; empty for a single number. Raises a ValueError if the pipeline fails on every number.

    Args:
        draw: runs a job, and returns the seconds that it took.
    """
    if len(sizes) == 1:
        return {}
    sides = [inputs.height or SIDE, inputs.width or SIDE]
    multiple = abilities["multiple"]
    halves = [max(multiple, side // 2 // multiple * multiple) for side in sides]
    common = {"num_inference_steps": STEPS, "guidance_scale": inputs.guidance_scale, "num_frames": inputs.num_frames}
    for takes_picture in (False, True):
        found: Measured = {}
        for size in sizes:
            for height, width in (halves, sides):
                settings = common | {"height": height, "width": width}
                image = png(Image.new("RGB", (width, height))) if takes_picture else None
                job = partial(Job, "a", "a" * inputs.use_cfg_parallel, 0, settings, image, retry=True)
                jobs = [job(ranks={size: 0.0}) for _ in range(ROUNDS)]
                took = [await draw(one) / STEPS for one in jobs]
                if all(not one.failure and size in one.ranks for one in jobs):  # all ran on this many ranks
                    found.setdefault(size, []).append((pixels(settings), min(took[1:])))
        if found := {size: both for size, both in found.items() if len(both) == 2}:
            return found
    raise ValueError(f"elastic cannot measure calls at {sides[1]}x{sides[0]} and half of it: {jobs[0].failure}")


def pixels(settings: dict[str, Any]) -> int:
    """Pixels of all frames."""
    return (settings["height"] or SIDE) * (settings["width"] or SIDE) * (settings["num_frames"] or 1)


def seconds(jobs: list[Job], size: int, measured: Measured) -> float:
    """Predicted seconds of a call on this many ranks: by the planner, else from the measurements at startup."""
    settings, planned = jobs[0].settings, jobs[0].ranks.get(size)
    if planned or not measured:
        return len(jobs) * (planned or 1.0)
    if size not in measured:  # it ran out of memory
        return math.inf
    (small, low), (large, high) = measured[size]
    slope = max(high - low, 0.0) / max(large - small, 1)
    return len(jobs) * settings["num_inference_steps"] * (low + slope * max(pixels(settings) - small, 0))


def placed(
    calls: list[list[Job]], until: list[float], predict: Callable[[list[Job], int], float], sizes: list[int], now: float
) -> list[tuple[list[Job], range, float]]:
    """Return the calls to start now, with their ranks and predicted end times.

    Calls are placed oldest first, each on the ranks on which it ends soonest. The number of ranks per call is limited
    to the value that minimizes the sum of all end times. Busy ranks are reserved, so that no newer call delays this.

    Args:
        until: for each rank, the predicted end of its running call; 0 if it is idle.
        sizes: the numbers of ranks for calls whose jobs do not specify theirs.
    """

    def under(most: int) -> list[tuple[list[Job], range, float, bool]]:
        """Each call with its ranks, its end, and whether its ranks are free now."""
        free, found = [max(end, now + SOON) if end else now for end in until], []
        for jobs in calls[:LOOKED_AT]:
            allowed = list(jobs[0].ranks or sizes)
            end, size, first = min(
                (max(free[first : first + size]) + predict(jobs, size), size, first)
                for size in [one for one in allowed if one <= most] or allowed[:1]
                for first in range(0, len(free), size)
            )
            found.append((jobs, range(first, first + size), end, max(free[first : first + size]) <= now))
            free[first : first + size] = [end] * size
        return found

    best = min(map(under, sizes), key=lambda found: sum(end for *_, end, _ in found))
    return [(jobs, ranks, end) for jobs, ranks, end, is_free in best if is_free]
