"""Checks of methods on several ranks that share one device (gloo), or that have one device each (its own backend)."""

import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any
from unittest import mock

import diffusers
import torch
import torch.distributed as dist
import transformers
from torch._dynamo.utils import counters

from xfuser import xDiTParallel, xFuserArgs
from xfuser.core import compiler, device as devices
from xfuser.core.meters import traffic
from xfuser.pipeline_io.media import media_of
from xfuser.testing import matrix
from xfuser.testing.gpu.report import Check
from xfuser.testing.gpu.staging import Staged
from xfuser.testing.loop import loop_of
from xfuser.testing.ranks import RankPool
from xfuser.testing.zoo import FAMILIES
from xfuser.weights.loading import load_pipeline

MODELS = ("flux", "sd3", "wan", "pixart", "hunyuan_video", "qwen_image")
EXACT = 1e-4  # relative to serial, in float32: the order of an accelerator's sums depends on the shapes
WORSE = 3  # allowed multiple of the error of one rank in bfloat16
PATHS = {"pipefusion": "channels", "distrifusion": "distrifusion", "tensor": "tensor"}  # on the device's own backend
TWO = {"ulysses_degree": 2}
SHIPPED = (  # path, title, flags of the shipped pipeline
    ("loading", "PipeFusion", {"pipefusion_parallel_degree": 2, "warmup_steps": 2}),
    ("loading", "tensor parallelism", {"tensor_parallel_degree": 2}),
    ("shards", "sharded weights and text encoders", TWO | {"fully_shard_degree": 2, "text_encoder": "shard"}),
    ("shards", "offloaded text encoders", TWO | {"text_encoder": "offload"}),
    ("vae", "parallel VAE", TWO | {"use_parallel_vae": True}),
    ("vae", "parallel VAE, rows by free memory", TWO | {"use_parallel_vae": True, "vae_chunk_rows": "auto"}),
    ("offload", "model offload", TWO | {"enable_model_cpu_offload": True}),
    ("offload", "sequential offload", TWO | {"enable_sequential_cpu_offload": True}),
)
PROMPT = "a red circle above a blue square"


@dataclass
class Pools:
    """The ranks of all checks, started on first use."""

    count: int  # number of accelerators
    most: int = 4  # maximum number of ranks

    @cached_property
    def shared(self) -> RankPool:
        """Ranks that share one accelerator, over gloo."""
        return RankPool(self.most)

    @cached_property
    def own(self) -> RankPool:
        """Ranks with one accelerator each, over its own backend."""
        return RankPool(min(self.most, self.count), devices.backend())

    def of(self, own: bool) -> RankPool:
        """Return the ranks with one accelerator each, or those that share one."""
        return self.own if own else self.shared

    def missing(self, own: bool, ranks: int) -> str | None:
        """Return why this many ranks cannot run, or cannot have one accelerator each; None if they can."""
        if ranks > self.most:
            return f"requires {ranks} ranks; the short form has {self.most}"
        if not own or self.count >= ranks:
            return None
        return f"requires {ranks}; this machine has {self.count or 'no'} accelerator{'s' * (self.count > 1)}"

    def close(self) -> None:
        """Stop all ranks that were started."""
        for name in ("shared", "own"):
            if name in vars(self):
                getattr(self, name).close()


def quiet() -> None:
    """Let Diffusers and Transformers log only errors."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
        library.utils.logging.disable_progress_bar()


@contextmanager
def on_device() -> Iterator[torch.device]:
    """Within the context, this rank uses its device; over gloo, all use the first one, and messages are staged."""
    shares = devices.device_type() != "cpu" and dist.get_backend() != devices.backend()
    torch.backends.cudnn.allow_tf32 = False  # convolutions are compared in float32
    quiet()
    with mock.patch.object(torch.accelerator, "device_count", lambda: 1) if shares else nullcontext():
        devices.use(dist.get_rank())
        with Staged() if shares and dist.get_world_size() > 1 else nullcontext():
            yield devices.device(dist.get_rank())


def forget() -> None:
    """Free what earlier jobs of this process have left, and count the peak of memory anew."""
    gc.collect()
    devices.restart_peak_memory()


def drawn(
    family: str, degrees: dict[str, Any], call: dict[str, Any], dtype: torch.dtype
) -> tuple[list[torch.Tensor], int]:
    """On a rank: return the result of a tiny loop, and the bytes that this rank has sent."""
    with on_device() as device, traffic() as sent:
        return _draw(family, degrees, call, device, dtype), sent.total


def drawn_by_compiled(
    family: str, degrees: dict[str, Any], call: dict[str, Any], dtype: torch.dtype
) -> tuple[list[torch.Tensor], int]:
    """The same with compiled blocks; return the number of compiled graphs, as none are made within a dispatch mode."""
    counters.clear()
    with on_device() as device:
        result = _draw(family, degrees | {"use_torch_compile": True}, call, device, dtype)
    if not (graphs := counters["stats"]["unique_graphs"]):
        raise AssertionError("nothing was compiled")
    return result, graphs


def _draw(
    family: str, degrees: dict[str, Any], call: dict[str, Any], device: torch.device, dtype: torch.dtype
) -> list[torch.Tensor]:
    pipe = loop_of(FAMILIES[family]).to(device, dtype)
    parallel = xDiTParallel(pipe, *xFuserArgs(**degrees).create_config())
    result = [x.float().cpu() for x in parallel(FAMILIES[family], **call)]
    parallel.unwrap()
    return result


def shipped(flags: dict[str, Any]) -> tuple[torch.Tensor, int]:
    """On a rank: return the image of the shipped pipeline, loaded with these flags, and the peak memory."""
    with on_device():
        forget()
        args = xFuserArgs(prompt=[PROMPT], num_inference_steps=2, dtype="fp32", output_type="pt", **flags)
        engine, inputs = args.create_config()
        parallel = xDiTParallel(load_pipeline(engine, inputs), engine, inputs)
        parallel.set_progress_bar_config(disable=True)
        (picture,) = media_of(parallel(**parallel.call_arguments()))
        return picture.float().cpu(), devices.peak_memory()


def checks(pools: Pools, short: bool) -> Iterator[Check]:
    """Yield checks of all methods and of the shipped pipeline, on ranks that share a device or have one each."""
    for own in (False, True):
        for family in MODELS[: 1 if short else None]:
            for method in matrix.METHODS:
                if not matrix.refusal(family, method):
                    yield _method(pools, own, family, method)
    for own, ranks in ((False, 1), (True, 2)):
        missing = "skipped in the short form" if short else compiler.missing() or pools.missing(own, ranks)
        name = f"flux, {ranks} ranks, {_where(own)}"
        yield Check("compiled", name, partial(_compare_compiled, pools, own, ranks), missing)
    for own in (False, True):
        for path, title, flags in SHIPPED[: 4 if short else None]:
            ranks = math.prod((1, *(flags[name] for name in flags if name in DEGREES)))
            missing = pools.missing(own, ranks)
            if path == "offload" and devices.device_type() == "cpu":
                missing = "requires an accelerator"
            name = f"{title}, {_where(own)}"
            yield Check(path, name, partial(_ship, pools, own, ranks, flags), missing)


DEGREES = ("ulysses_degree", "pipefusion_parallel_degree", "tensor_parallel_degree")


def _where(own: bool) -> str:
    return "a device each" if own else "one device"


def _method(pools: Pools, own: bool, family: str, method: str) -> Check:
    ranks = matrix.METHODS[method][0]
    path = next((path for name, path in PATHS.items() if name in method), "nccl") if own else "shared"
    run = partial(_compare, pools, own, family, method)
    return Check(path, f"{family}, {method}, {_where(own)}", run, pools.missing(own, ranks))


def _compare_compiled(pools: Pools, own: bool, ranks: int) -> str:
    """Compare compiled blocks with serial eager ones, in float32."""
    _, _, call = matrix.setting("flux", "ulysses2")
    degrees = TWO if ranks == 2 else {}
    expected = [x.cpu() for x in matrix.reference("flux", degrees, call, devices.device(0))]
    results = pools.of(own).run(ranks, drawn_by_compiled, "flux", degrees, call, torch.float32)
    worst = max(matrix.error(result, expected) for result, _ in results)
    told = f"float32 {worst:.0e}; {results[0][1]} graphs"
    if not worst <= EXACT:
        raise AssertionError(told)
    return told


def _compare(pools: Pools, own: bool, family: str, method: str) -> str:
    """Compare a cell of the matrix with its float32 reference: in float32, and in bfloat16 relative to one rank."""
    ranks, degrees, call = matrix.setting(family, method)
    device, found = devices.device(0), {}
    expected = [x.float().cpu() for x in matrix.reference(family, degrees, call, device, torch.float32)]
    half = [x.float().cpu() for x in matrix.reference(family, degrees, call, device, torch.bfloat16)]
    for dtype in (torch.float32, torch.bfloat16):
        results = pools.of(own).run(ranks, drawn, family, degrees, call, dtype)
        found[dtype] = max(matrix.error(result, expected) for result, _ in results)
    exact, near, serial = found[torch.float32], found[torch.bfloat16], matrix.error(half, expected)
    sent = max(bytes_sent for _, bytes_sent in results)
    told = f"float32 {exact:.0e}; bfloat16 {near:.0e}, one rank {serial:.0e}; {sent / 1e3:.0f} kB sent"
    if not exact <= max(EXACT, matrix.TOLERANCES.get(family, 0)) or not near <= WORSE * serial + EXACT:
        raise AssertionError(told)
    return told


def _ship(pools: Pools, own: bool, ranks: int, flags: dict[str, Any]) -> str:
    """Compare the shipped pipeline with these flags with the same pipeline on one rank."""
    pool = pools.of(own)
    ((expected, alone),) = pool.run(1, shipped, {})
    results = pool.run(ranks, shipped, flags)
    worst = max((picture - expected).abs().max().item() for picture, _ in results)
    told = f"image {worst:.0e}; peak {max(peak for _, peak in results) / 1e6:.0f} MB, one rank {alone / 1e6:.0f} MB"
    if not worst <= 1e-3:
        raise AssertionError(told)
    return told
