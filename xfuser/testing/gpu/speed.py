"""Speed of blocks of the sizes of Flux and Wan on one or several devices, and the overlap of messages with compute."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import diffusers
import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile

from xfuser import parallelize, xDiTParallel, xFuserArgs
from xfuser.core import device as devices
from xfuser.core.meters import traffic
from xfuser.testing.gpu.ranks import Pools, forget, on_device
from xfuser.testing.gpu.report import Check
from xfuser.testing.loop import DenoisingLoop
from xfuser.testing.ranks import own_parallelism_runs_here
from xfuser.testing.zoo.family import Family

FORWARDS = 5
DIFFUSERS = "Diffusers' Ulysses"
MESSAGE = "nccl"  # part of the names of communication kernels
OVERLAPPED = ("ulysses_degree", "ring_degree", "pipefusion_parallel_degree", "distrifusion_degree")
STEPS = 4  # of the profiled call: one synchronous step, then three others
Sent = dict[str, float]


@dataclass(frozen=True)
class Size:
    """Blocks with random weights and heads of 128 channels, for tokens of image (frames, rows, columns) and text."""

    model: str
    heads: int
    layers: int
    image: tuple[int, int, int]
    text: int

    def build(self) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return the transformer and the arguments of a forward, on torch's default device."""
        torch.manual_seed(0)
        return (_flux if self.model == "Flux" else _wan)(self)

    @property
    def tokens(self) -> int:
        """Length of the sequence of keys and values that ranks exchange."""
        frames, rows, columns = self.image
        return frames * rows * columns + self.text * (self.model == "Flux")

    def formula(self, degrees: dict[str, int], element: int) -> float:
        """Bytes that a rank sends in a forward's attention (arXiv 2309.14509, 2310.01889)."""
        ((flag, ranks),) = degrees.items()
        factor = 4 * (ranks - 1) / ranks**2 if flag == "ulysses_degree" else 2 * (ranks - 1) / ranks
        return factor * self.tokens * self.heads * 128 * self.layers * element


SIZES = (Size("Flux", 24, 6, (1, 64, 64), 512), Size("Wan", 40, 2, (21, 30, 52), 512))
SMALL = (Size("Flux", 4, 2, (1, 8, 6), 8), Size("Wan", 4, 1, (3, 4, 2), 8))


def _flux(size: Size) -> tuple[nn.Module, dict[str, Tensor]]:
    double, width = size.layers // 3, size.heads * 128
    model = diffusers.FluxTransformer2DModel(
        num_layers=double, num_single_layers=size.layers - double, num_attention_heads=size.heads,
        attention_head_dim=128, joint_attention_dim=width, pooled_projection_dim=64, guidance_embeds=False,
    )  # fmt: skip
    grid = torch.cartesian_prod(*(torch.arange(count) for count in size.image)).float()
    return model, {
        "hidden_states": torch.randn(1, len(grid), 64), "encoder_hidden_states": torch.randn(1, size.text, width),
        "pooled_projections": torch.randn(1, 64), "timestep": torch.ones(1), "img_ids": grid,
        "txt_ids": torch.zeros(size.text, 3),
    }  # fmt: skip


def _wan(size: Size) -> tuple[nn.Module, dict[str, Tensor]]:
    model = diffusers.WanTransformer3DModel(
        num_layers=size.layers, num_attention_heads=size.heads, attention_head_dim=128, text_dim=64,
        ffn_dim=size.heads * 346,
    )  # fmt: skip
    frames, rows, columns = size.image
    return model, {
        "hidden_states": torch.randn(1, 16, frames, 2 * rows, 2 * columns),
        "encoder_hidden_states": torch.randn(1, size.text, 64), "timestep": torch.ones(1),
    }  # fmt: skip


def checks(pools: Pools, short: bool) -> Iterator[Check]:
    """Yield checks of serial, Ulysses, the ring and Diffusers' Ulysses; the CPU runs small sizes as a smoke test."""
    on_cpu = devices.device_type() == "cpu"
    ranks = 2 if on_cpu else max(1, min(pools.most, pools.count))
    for size in SMALL if on_cpu else SIZES:
        if not (short and size is SMALL[1]):
            yield Check("speed", f"{size.model}, {ranks} ranks", partial(_compared, pools, size, ranks))
    missing = pools.missing(True, 2)
    for flag in OVERLAPPED:
        run = partial(_overlap, pools, SIZES[0], {flag: max(2, min(pools.most, pools.count))})
        yield Check("overlap", f"Flux, {flag}", run, missing)


def _compared(pools: Pools, size: Size, ranks: int) -> str:
    """Return the median milliseconds of a forward, serial and under each method."""
    ways: dict[str, Any] = {"serial": None}
    if ranks > 1:
        ways |= {f"{flag} {ranks}": {f"{flag}_degree": ranks} for flag in ("ulysses", "ring")}
        if hasattr(diffusers, "ContextParallelConfig") and size.heads % ranks == 0:
            ways[DIFFUSERS] = DIFFUSERS
    pool, told = pools.of(pools.count > 1), []
    for name, way in ways.items():
        one = pool.run(1 if way is None else ranks, timed, size, way)[0]
        words = f"{name} {1e3 * one['seconds']:.1f} ms, peak {one['peak'] / 1e9:.2f} GB"
        if isinstance(way, dict):
            words += f", sent {one['sent'] / 1e6:.2f} MB (formula {size.formula(way, one['element']) / 1e6:.2f})"
        told.append(words)
    return "; ".join(told)


def timed(size: Size, way: dict[str, int] | str | None) -> Sent:
    """On a rank: return the seconds of a forward, bytes sent, peak memory, and bytes per element."""
    with _ready(size, way) as forward:
        with traffic() as sent:
            forward()
        seconds = devices.seconds_of(forward, FORWARDS)
        element = devices.default_dtype().itemsize
        return {"seconds": seconds, "sent": sent.total, "peak": devices.peak_memory(), "element": element}


@contextmanager
def _ready(size: Size, way: dict[str, int] | str | None) -> Iterator[Any]:
    """Within the context, provide a forward that has run twice."""
    with on_device() as device, torch.no_grad():
        dtype = devices.default_dtype()
        with device:
            model, arguments = size.build()
        model = model.to(dtype).eval()
        arguments = {name: x if name.endswith("_ids") else x.to(dtype) for name, x in arguments.items()}
        forward = partial(model, **arguments, return_dict=False)
        forget()  # the model was built in float32
        with _divided(model, way):
            for _ in range(2):
                forward()
            yield forward


@contextmanager
def _divided(model: nn.Module, way: dict[str, int] | str | None) -> Iterator[None]:
    if way == DIFFUSERS:
        ranks = torch.distributed.get_world_size()
        with own_parallelism_runs_here():
            model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=ranks))
        yield
        return
    with parallelize(model, None, xFuserArgs(**(way or {})).create_config()[0]).active():
        yield


def _overlap(pools: Pools, size: Size, degrees: dict[str, int]) -> str:
    """Return the fraction of communication time during which the device also computes."""
    (ranks,) = degrees.values()
    shares = pools.own.run(ranks, hidden, size, degrees)
    return f"{min(shares):.0%} to {max(shares):.0%} of the time of messages is hidden, by rank"


def hidden(size: Size, degrees: dict[str, int]) -> float:
    """On a rank: return this fraction for one call, from the kernels that a profiler records on the device."""
    with called(size, degrees) as call:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            call()
            devices.synchronize()
        spans: dict[bool, list[tuple[int, int]]] = {True: [], False: []}
        for event in profiler.profiler.kineto_results.events():
            if event.device_type() != torch.autograd.DeviceType.CPU:
                span = (event.start_ns(), event.start_ns() + event.duration_ns())
                spans[MESSAGE in event.name().lower()].append(span)
        messages, computes = (union(spans[kind]) for kind in (True, False))
        whole = length(messages)
        if not whole:
            raise AssertionError("the profiler recorded no communication kernel")
        return (whole + length(computes) - length(union(messages + computes))) / whole


@contextmanager
def called(size: Size, degrees: dict[str, int]) -> Iterator[Any]:
    """Within the context, provide a wrapped denoising loop over blocks of this size that has run once."""
    with on_device() as device:
        with device:
            model, arguments = size.build()
        latents, _ = arguments.pop("hidden_states"), arguments.pop("timestep")
        family = Family(type(model).__name__, size.model, {}, latents.shape[1:], lambda *_: arguments)
        loop = DenoisingLoop(model.to(devices.default_dtype()).eval(), FlowMatchEulerDiscreteScheduler())
        parallel = xDiTParallel(loop, *xFuserArgs(**degrees).create_config())
        call = partial(parallel, family, guidance="none", num_inference_steps=STEPS)
        call()
        yield call
        parallel.unwrap()


def union(spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """Merge overlapping spans."""
    joined: list[tuple[int, int]] = []
    for start, stop in sorted(spans):
        if joined and start <= joined[-1][1]:
            joined[-1] = joined[-1][0], max(joined[-1][1], stop)
        else:
            joined.append((start, stop))
    return joined


def length(spans: list[tuple[int, int]]) -> int:
    """Return the total length of spans that do not overlap."""
    return sum(stop - start for start, stop in spans)
