"""Find the largest image that fits: a decoder of Stable Diffusion's structure, by rows, on 1, 2, and 4 ranks."""

import os
import tempfile
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from xfuser.bench.cases import decoder
from xfuser.core.meters import peak_allocation
from xfuser.vae.engines import parallel_vae

TITLE = "The largest image within a fixed memory, AutoencoderKL, widths 32 to 128"
WIDTHS = (32, 64, 128, 128)  # a quarter of Stable Diffusion's
SERIAL = 384  # side in pixels; the memory that serial requires for it is the limit
STEP = 32
CASES = {"serial": (1, None), "1 rank": (1, 8), "2 ranks": (2, 8), "4 ranks": (4, 8)}  # ranks, chunk rows


def run_memory() -> int:
    """Start the ranks of each case and print the table; returns the exit code."""
    print(f"{TITLE}\n\n| | rows at a time | largest image | pixels | allocated |\n|---|---|---|---|---|")
    for label, (ranks, rows) in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(_largest, args=(label, ranks, rows, os.path.join(folder, "store")), nprocs=ranks)
    return 0


def _largest(rank: int, label: str, ranks: int, rows: int | None, store: str) -> None:
    """Run one rank; rank 0 prints a line."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=ranks)
    torch.manual_seed(0)
    vae = decoder(WIDTHS)
    limit = _peak(vae, SERIAL, None)
    fits, side = limit, SERIAL
    low, high = SERIAL, 6 * SERIAL
    while rows and high - low > STEP:
        middle = (low + high) // (2 * STEP) * STEP
        peak = _peak(vae, middle, rows)
        if peak <= limit:
            low, fits, side = middle, peak, middle
        else:
            high = middle
    if rank == 0:
        print(f"| {label} | {rows or 'all'} | {side} x {side} | {(side / SERIAL) ** 2:.1f} | {fits / 1e6:.0f} MB |")
    dist.destroy_process_group()


def _peak(vae: Any, side: int, rows: int | None) -> int:
    """Peak bytes allocated in a decode, on the rank with the highest peak."""
    latents = torch.randn(1, 4, side // 8, side // 8)
    with parallel_vae(vae, dist.group.WORLD, "native", chunk_rows=rows) if rows else nullcontext():
        peak = torch.tensor(peak_allocation(lambda: vae.decode(latents)))
    dist.all_reduce(peak, dist.ReduceOp.MAX)
    return int(peak)
