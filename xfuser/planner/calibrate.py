"""Measure the constants of this machine, on all of its ranks at once; takes at most a minute."""

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F

from xfuser.core import device as devices
from xfuser.core.distributed import get_world_group
from xfuser.planner.machines import CACHED, EXPS, KERNEL, NODE, Constants, Machine, links_of
from xfuser.planner.trace import Operator, Tracer

SECONDS = 0.5  # minimum total time of a measurement
QUEUED = 20  # actions queued at a time on an accelerator
NO_LIMIT = math.inf  # FLOPs per joule: the measured peak already includes the power limit
EXCHANGES = 100  # repetitions when measuring links, the same on all ranks; a tenth for large messages of a GPU
BLOCKS = 12  # in the transformer that is timed for the host cost per operator


def measure() -> Machine:
    """Measure this rank's device, host, and links while the other ranks do the same; return rank 0's result."""
    group = get_world_group()
    device, dtype = devices.device(group.local_rank), devices.default_dtype()
    peak = _products(device, dtype)
    is_cpu = device.type == "cpu"
    small, large = (_copies(device, 1 << bits) for bits in ((18, 22) if is_cpu else (22, 28)))
    small = max(small, large)  # a cache is no slower than the memory: where it seems so, it outran the host
    host = _host(device, dtype)
    start, rate = _links(device) if group.world_size > 1 else links_of(devices.device_name()) or (0.0, large)
    convolution = _convolutions(device, dtype) / peak
    constants = Constants(NO_LIMIT, 0.0, convolution, 1.0, 1.0, host, start, 0.0)
    machine = Machine(
        name=devices.device_name(), peak=peak, units=1, clock=small / CACHED, cache=0.0 if is_cpu else 40e6,
        bandwidth=large, memory=devices.total_memory(), link=min(rate, large), constants=constants,
        kernels=_attention(device, dtype) / peak, exps=_activations(device, dtype) * CACHED / (EXPS * small),
        wide=1.0 if is_cpu else _products(device, torch.float32) / peak, node=NODE, synchronous=is_cpu,
        kernel=0.0 if is_cpu else KERNEL,
    )  # fmt: skip
    return _of_first_rank(machine)


def _of_first_rank(machine: Machine) -> Machine:
    """Broadcast the machine as the first rank measured it to every rank."""
    return get_world_group().broadcast_object(machine)


def _each(action: Callable[[], Any]) -> float:
    """Median seconds of an action, repeated for at least :data:`SECONDS` while all ranks do the same.

    On an accelerator, :data:`QUEUED` actions are queued at a time, as within a model.
    """
    times = 1 if devices.device_type() == "cpu" else QUEUED

    def repeated() -> None:
        for _ in range(times):
            action()

    action()
    devices.synchronize()
    get_world_group().barrier()
    return devices.seconds_of(repeated, least=SECONDS) / times


def _products(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a matrix product the size of one in a feed-forward layer."""
    rows, width = (1024, 1024) if device.type == "cpu" else (8192, 8192)
    x, weight = (
        torch.randn(rows, width, device=device, dtype=dtype),
        torch.randn(width, width, device=device, dtype=dtype),
    )
    return 2 * rows * width * width / _each(lambda: F.linear(x, weight))


def _convolutions(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of a convolution the size of one in a VAE."""
    channels, side = (32, 128) if device.type == "cpu" else (256, 512)
    x = torch.randn(1, channels, side, side, device=device, dtype=dtype)
    weight = torch.randn(channels, channels, 3, 3, device=device, dtype=dtype)
    return 2 * 9 * channels * x.numel() / _each(lambda: F.conv2d(x, weight, padding=1))


def _attention(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of attention."""
    heads, tokens, size = (8, 1024, 64) if device.type == "cpu" else (24, 16384, 128)
    q = torch.randn(1, heads, tokens, size, device=device, dtype=dtype)
    return 4 * heads * tokens * tokens * size / _each(lambda: F.scaled_dot_product_attention(q, q, q))


def _copies(device: torch.device, elements: int) -> float:
    """Bytes per second of an operator that reads and writes this many elements."""
    x = torch.randn(elements, device=device)
    return 2 * x.nbytes / _each(lambda: x * 1.01)


def _activations(device: torch.device, dtype: torch.dtype) -> float:
    """Elements per second of a feed-forward layer's activation."""
    x = torch.randn(1 << (18 if device.type == "cpu" else 24), device=device, dtype=dtype)
    return x.numel() / _each(lambda: F.gelu(x, approximate="tanh"))


def _host(device: torch.device, dtype: torch.dtype) -> float:
    """Host seconds per operator within a model."""
    from diffusers import FluxTransformer2DModel

    model = FluxTransformer2DModel(
        in_channels=16, num_layers=BLOCKS // 2, num_single_layers=BLOCKS // 2, attention_head_dim=16,
        num_attention_heads=4, joint_attention_dim=32, pooled_projection_dim=32, axes_dims_rope=(4, 6, 6),
    )  # fmt: skip
    model = model.to(device, dtype).eval()
    numbers = {"hidden_states": (1, 16, 16), "encoder_hidden_states": (1, 8, 32), "pooled_projections": (1, 32)}
    arguments = {name: torch.zeros(shape, device=device, dtype=dtype) for name, shape in numbers.items()}
    arguments |= {name: torch.zeros(count, 3, device=device) for name, count in (("img_ids", 16), ("txt_ids", 8))}
    arguments["timestep"] = torch.ones(1, device=device, dtype=dtype)
    with torch.no_grad():
        tracer = Tracer()
        with tracer:
            model(**arguments)
        count = sum(isinstance(event, Operator) for event in tracer.trace.events)
        return _each(lambda: model(**arguments)) / count


def _links(device: torch.device) -> tuple[float, float]:
    """Seconds until a message starts, and bytes per second after that, for exchanges over all ranks.

    Ranks do not finish the computation before a message at the same moment, and take time to wake up for it. The first
    figure includes both.
    """
    ranks = dist.get_world_size()

    rows, weight = torch.randn(512, 512, device=device), torch.randn(512, 512, device=device)

    def exchange(count: int, times: int) -> float:
        """Mean seconds of two collectives, each after a product; both send ``ranks - 1`` times this many elements."""
        x, y = torch.zeros(ranks * count, device=device), torch.empty(ranks * count, device=device)
        half = torch.zeros(ranks * count // 2, device=device)
        both = (lambda: dist.all_to_all_single(y, x), lambda: dist.all_reduce(half))
        taken = [devices.seconds_of(lambda one=one: (rows @ weight, one()), times) for one in both]
        return max(0.0, sum(taken) / 2 - devices.seconds_of(lambda: rows @ weight, times))

    little, much = 256, 1 << (20 if device.type == "cpu" else 26)
    # On a GPU, each of the large ones sends up to 2 GB: over PCIe, a hundred would take a minute.
    short, long = exchange(little, EXCHANGES), exchange(much, EXCHANGES if device.type == "cpu" else EXCHANGES // 10)
    return short, 4 * (ranks - 1) * (much - little) / max(long - short, 1e-9)
