"""The bench of the parallel VAE: a decoder of Stable Diffusion's size on two ranks, against one and distvae."""

import statistics
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import diffusers
import torch
import torch.distributed as dist

from xfuser.bench.meters import LiveMemory, traffic
from xfuser.vae.engines import available_engines, parallel_vae

TITLE = "Parallel VAE: AutoencoderKL, widths 128 to 512, {0} x {0} pixels"
COUNTED = 256  # pixels on a side where bytes and errors are taken


def run_vae(rank: int, rounds: int, store: str, pixels: int) -> None:
    """One rank's part for pictures of ``pixels`` on a side; rank 0 prints the table."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    vae = decoder((128, 256, 512, 512))
    engines = [engine for engine in available_engines() if engine != "auto"]
    parallel = {engine: partial(parallel_vae, vae, dist.group.WORLD, engine) for engine in engines}
    small, latents = (torch.randn(1, 4, side, side) for side in (COUNTED // 8, pixels // 8))
    rows = {label: _counted(vae, small, context) for label, context in {"serial": nullcontext, **parallel}.items()}
    times: dict[str, list[float]] = {label: [] for label in ("beside", "alone", *parallel)}
    for _ in range(rounds):
        times["beside"].append(_timed(lambda: _decode(vae, latents)))
        times["alone"].append(_timed(lambda: _decode(vae, latents) if rank == 0 else None))
        for label, context in parallel.items():
            with context():
                times[label].append(_timed(lambda: _decode(vae, latents)))
    if rank == 0:
        _print({label: statistics.median(values) for label, values in times.items()}, rows)
    dist.destroy_process_group()


def decoder(widths: tuple[int, int, int, int]) -> Any:
    """An ``AutoencoderKL`` of Stable Diffusion's structure with random weights, the same on all ranks."""
    torch.manual_seed(0)
    return diffusers.AutoencoderKL(
        block_out_channels=widths,
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        layers_per_block=2,
        latent_channels=4,
    ).eval()


def _decode(vae: Any, latents: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return vae.decode(latents, return_dict=False)[0]


def _timed(action: Callable[[], Any]) -> float:
    dist.barrier()
    start = time.perf_counter()
    action()
    dist.barrier()
    return time.perf_counter() - start


def _counted(
    vae: Any, latents: torch.Tensor, context: Callable[[], AbstractContextManager[None]]
) -> tuple[float, int, int]:
    """Relative error, bytes sent by this rank and bytes of live tensors at the peak."""
    expected = _decode(vae, latents)
    with context(), traffic() as sent, LiveMemory() as memory:
        output = _decode(vae, latents)
    return ((output - expected).abs().max() / expected.abs().max()).item(), sent.total, memory.peak


def _print(times: dict[str, float], rows: dict[str, tuple[float, int, int]]) -> None:
    alone, beside = times.pop("alone"), times.pop("beside")
    print(f"Serial decode {alone:.1f} s alone, {beside:.1f} s beside another. Bytes and errors at {COUNTED} pixels.\n")
    print("| engine | decode | efficiency | speed-up | sent per rank | live tensors | rel. error |")
    print("|---|---|---|---|---|---|---|")
    for label, seconds in times.items():
        error, sent, memory = rows[label]
        print(
            f"| {label} | {seconds:.1f} s | {beside / (2 * seconds):.2f} | {alone / seconds:.2f} | {sent / 1e6:.1f} MB"
            f" | {memory / 1e6:.1f} MB ({rows['serial'][2] / 1e6:.1f}) | {error:.0e} |"
        )
    print(flush=True)
