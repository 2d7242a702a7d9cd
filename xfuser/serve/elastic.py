"""``--elastic``: each call on as many ranks as end it soonest, where every rank has all weights."""

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

METHODS = ("cfg", "ulysses", "ring", "dp")  # of a team; the first ones are kept longest as teams get smaller
SIDE = 512  # pixels, where neither a request nor a flag says it
SOON = 0.001  # seconds to the end of a call that takes longer than predicted
LOOKED_AT = 32  # calls that are placed at a time
ROUNDS, STEPS = 3, 2  # calls of each size that are measured at the start, of which the first does not count

Measured = dict[int, list[tuple[int, float]]]  # by number of ranks: pixels and seconds of a step, of two sizes


def check(config: EngineConfig) -> None:
    """Raise a ValueError unless any number of ranks that divides the world can draw an image, and the same one."""
    parallel = config.parallel_config
    flags = {names.flag: getattr(parallel, names.field) for name, names in DEGREES.items() if name not in METHODS}
    flags |= {name: getattr(parallel, name) for name in ("fully_shard_degree", "num_pipeline_patch")}
    flags["text_encoder"] = config.runtime_config.text_encoder
    given = [f"{flag}={value}" for flag, value in flags.items() if value not in (1, "replicate")]
    allowed = ", ".join(DEGREES[name].flag for name in METHODS)
    if given:
        told = f"elastic requires all weights on every rank, and images that are the same on any number: {given[0]}"
        raise ValueError(f"{told} does not go with it; remove one of them. Those that do are {allowed}")
    if config.world_size == 1:
        raise ValueError(f"elastic requires more than one rank: give {allowed}, or remove it")


def sizes_of(world_size: int, elastic: bool) -> list[int]:
    """Numbers of ranks that a call may have."""
    return [size for size in range(1, world_size + 1) if world_size % size == 0 and (elastic or size == world_size)]


def degrees_of(parallel: ParallelConfig, size: int) -> ParallelConfig:
    """The degrees of a team of so many ranks: divisors of those of all ranks."""
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
    """Seconds of a step on each number of ranks that has the memory, at half of the default sides and at these; empty
    where there is one number. Raises a ValueError where the pipeline fails on any number.

    Args:
        draw: has a job drawn, and tells the seconds that it took.
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
                if all(not one.failure and size in one.ranks for one in jobs):  # all on so many ranks
                    found.setdefault(size, []).append((pixels(settings), min(took[1:])))
        if found := {size: both for size, both in found.items() if len(both) == 2}:
            return found
    raise ValueError(f"elastic measures calls at {sides[1]}x{sides[0]} and half of it: {jobs[0].failure}")


def pixels(settings: dict[str, Any]) -> int:
    """Of all frames."""
    return (settings["height"] or SIDE) * (settings["width"] or SIDE) * (settings["num_frames"] or 1)


def seconds(jobs: list[Job], size: int, measured: Measured) -> float:
    """What a call is predicted to take on so many ranks: by the planner, else by what was measured at start."""
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
    """The calls that begin now, with their ranks, and when they are predicted to end.

    Each call, the oldest first, gets the ranks on which it ends soonest, of at most the number for which the sum of all
    ends is least. Ranks that are not free yet are kept for it: no younger call delays it.

    Args:
        until: for each rank, when what it draws is predicted to end; 0 where it draws nothing.
        sizes: the numbers of ranks for calls whose jobs do not say theirs.
    """

    def under(most: int) -> list[tuple[list[Job], range, float, bool]]:
        """Each call with its ranks, its end, and whether these are free now."""
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
