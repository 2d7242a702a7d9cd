"""The cases of the bench: a transformer of the real class with random weights, timed under each method.

A round times, one after the other: a serial pass on both ranks at once (so that the machine is as busy as in a
parallel run), a serial pass on rank 0 alone, and a pass of each method on both ranks. Figures are medians over rounds.

    efficiency = serial pass beside another / (2 x parallel pass)      speed-up = serial pass alone / parallel pass
"""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any
from unittest import mock

import diffusers
import torch
import torch.distributed as dist

from xfuser.bench.meters import LiveMemory, traffic
from xfuser.config import EngineConfig, ModelConfig, ParallelConfig, RuntimeConfig
from xfuser.core.distributed import destroy_distributed_environment
from xfuser.parallel import xDiTParallel

HEADS, HEAD_DIM = 8, 64
HIDDEN = HEADS * HEAD_DIM
Forward = Callable[[], torch.Tensor]


@dataclass(frozen=True)
class Case:
    """One table: a model with its inputs, and the degrees to compare."""

    title: str
    model: Callable[[], torch.nn.Module]
    inputs: Callable[[], dict[str, Any]]
    methods: dict[str, ParallelConfig]
    peers: bool = False


def pixart(blocks: int = 8) -> torch.nn.Module:
    return diffusers.PixArtTransformer2DModel(
        num_attention_heads=HEADS, attention_head_dim=HEAD_DIM, in_channels=4, out_channels=4, num_layers=blocks,
        cross_attention_dim=HIDDEN, sample_size=128, patch_size=2, caption_channels=64, use_additional_conditions=False,
    )  # fmt: skip


def pixart_inputs(batch: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(batch, 4, 128, 128),
        "encoder_hidden_states": torch.randn(batch, 32, 64),
        "timestep": torch.full((batch,), 500),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
        "return_dict": False,
    }


def flux() -> torch.nn.Module:
    return diffusers.FluxTransformer2DModel(
        in_channels=64, num_layers=4, num_single_layers=8, attention_head_dim=HEAD_DIM, num_attention_heads=HEADS,
        joint_attention_dim=64, pooled_projection_dim=64, axes_dims_rope=(16, 24, 24),
    )  # fmt: skip


def flux_inputs(image: int, text: int) -> dict[str, Any]:
    return {
        "hidden_states": torch.randn(1, image, 64),
        "encoder_hidden_states": torch.randn(1, text, 64),
        "pooled_projections": torch.randn(1, 64),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.randint(0, 32, (image, 3)).float(),
        "txt_ids": torch.zeros(text, 3),
        "return_dict": False,
    }


SEQUENCE = {"ulysses": ParallelConfig(ulysses_degree=2), "ring": ParallelConfig(ring_degree=2)}
CASES = {
    "guidance": Case(
        "CFG: PixArt, 4,096 tokens, hidden 512, 8 layers, batch 2",
        pixart,
        lambda: pixart_inputs(2),
        {"cfg": ParallelConfig(cfg_degree=2)},
    ),
    "sequence": Case(
        "Sequence: PixArt, 4,096 tokens, hidden 512, 8 layers, batch 1", pixart, lambda: pixart_inputs(1), SEQUENCE
    ),
    "joint": Case(
        "Joint attention: Flux, 1,024 + 128 tokens, hidden 512, 4 + 8 layers",
        flux,
        lambda: flux_inputs(1024, 128),
        SEQUENCE,
        peers=True,
    ),
    "uneven": Case(
        "Joint attention: Flux, 1,023 + 127 tokens, hidden 512, 4 + 8 layers",
        flux,
        lambda: flux_inputs(1023, 127),
        SEQUENCE,
    ),
}


def run_case(rank: int, name: str, rounds: int, store: str) -> None:
    """One rank's part of a case; rank 0 prints the table."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    case = CASES[name]
    torch.manual_seed(0)
    inputs = case.inputs()
    serial = _pass(_seeded(case.model), inputs)
    contenders = {label: partial(_ours, case, inputs, degrees) for label, degrees in case.methods.items()}
    if case.peers:
        contenders |= _peers(case, inputs)
    expected = serial()
    rows = {label: _measure_once(contender, expected) for label, contender in contenders.items()}
    beside, alone, parallel = [], [], {label: [] for label in contenders}
    for _ in range(rounds):
        beside.append(_timed(serial))
        alone.append(_timed(serial if rank == 0 else lambda: None))
        for label, contender in contenders.items():
            with contender() as forward:
                parallel[label].append(_timed(forward))
    if rank == 0:
        _print(rows, statistics.median(beside), statistics.median(alone), parallel, _live(serial))
    destroy_distributed_environment()
    dist.destroy_process_group()


def _seeded(model: Callable[[], torch.nn.Module]) -> torch.nn.Module:
    torch.manual_seed(0)
    return model().eval()


def _pass(model: torch.nn.Module, inputs: dict[str, Any]) -> Forward:
    return torch.no_grad()(lambda: model(**inputs)[0])


@contextmanager
def _ours(case: Case, inputs: dict[str, Any], degrees: ParallelConfig) -> Iterator[Forward]:
    model = _seeded(case.model)
    engine = EngineConfig(ModelConfig(""), RuntimeConfig(torch.float32), degrees)
    with xDiTParallel(SimpleNamespace(components={"transformer": model}), engine).active():
        yield _pass(model, inputs)


def _peers(case: Case, inputs: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    """Diffusers' own Ulysses, where this release has it (its ring has no kernel for the CPU)."""
    if not hasattr(diffusers, "ContextParallelConfig"):
        return {}
    model = _seeded(case.model)
    with mock.patch("torch.accelerator.device_count", lambda: 1):  # it divides by the number of GPUs
        model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=2))
    return {"diffusers ulysses": partial(nullcontext, _pass(model, inputs))}


def _timed(forward: Forward) -> float:
    dist.barrier()
    start = time.perf_counter()
    forward()
    dist.barrier()
    return time.perf_counter() - start


def _measure_once(contender: Callable[[], Any], expected: torch.Tensor) -> tuple[float, int, int]:
    """Relative error, bytes sent by this rank, and bytes of live tensors at the peak."""
    with contender() as forward:
        with traffic() as sent:
            output = forward()
        error = ((output - expected).abs().max() / expected.abs().max()).item()
        return error, sent.total, _live(forward)


def _live(forward: Forward) -> int:
    with LiveMemory() as memory:
        forward()
    return memory.peak


def _print(rows: dict, beside: float, alone: float, parallel: dict[str, list[float]], serial_memory: int) -> None:
    print(
        f"Serial pass {alone:.2f} s alone, {beside:.2f} s beside another; live tensors {serial_memory / 1e6:.1f} MB.\n"
    )
    print("| method | pass | efficiency | speed-up | sent per rank | live tensors | rel. error |")
    print("|---|---|---|---|---|---|---|")
    for label, (error, sent, memory) in rows.items():
        seconds = statistics.median(parallel[label])
        print(
            f"| {label} | {seconds:.2f} s | {beside / (2 * seconds):.2f} | {alone / seconds:.2f} | {sent / 1e6:.1f} MB"
            f" | {memory / 1e6:.1f} MB | {error:.0e} |"
        )
    print(flush=True)
