"""Published measurements to compare the planner with: the configuration, the machine, and the time."""

import csv
import math
import os
from collections import Counter
from dataclasses import dataclass
from typing import Any

from xfuser.config import xFuserArgs
from xfuser.planner.machines import sheet_of
from xfuser.planner.published import named, published

FILES = ("points.csv", "points_from_images.csv")
UNLIKE = {  # words in a row's notes: why the row is left out
    "anomalous": "anomalous", "onediff": "another compiler", "genmo": "another implementation",
    "fitted cost model": "not measured", "extrapolated": "not measured", "FP8": "quantised messages",
    "async Ulysses": "another method", "without gloo": "another method", "ControlNet": "another model",
    "image edit": "another model", "2 input": "another model", "VAE patch": "another VAE", "VAE-P": "another VAE",
    "TE-P": "another VAE", "fsdp ": "offload", "HSDP": "offload", "offload": "offload",
    "framework LightX2V": "unnamed kernels", "framework FastVideo": "unnamed kernels",
    "framework SGL": "unnamed kernels", "LightX2V no cfg": "unnamed kernels",
}  # fmt: skip
NEWEST = ("_flash_3", "FA4", "CUDNN_ATTN", "sdpa_cudnn")  # attention kernels of the device's own generation
RECENT = ("vipshop/cache-dit", "distributed_inference.md")  # sources that ran Diffusers 0.36 or later with torch 2.9
TABLES = {"hunyuandit": (40 * 6, 88 * 4)}  # rotary tables in the attentions of a forward, bytes of each per token
FIELDS = {"height": "height", "width": "width", "frames": "num_frames"}
DISTILLED = 8  # maximum number of steps of a distilled model
DEGREES = ("ulysses", "ring", "cfg", "pipefusion", "tp")


@dataclass(frozen=True)
class Point:
    """One measurement.

    Attributes:
        degrees: Ulysses, ring, CFG, PipeFusion, tensor.
        scope: ``call``, ``denoise``, or ``step``: the part that ``seconds`` measures.
        newest: whether attention used kernels of the device's own generation.
        norms: whether one kernel computed an RMS norm.
        source: equal for points of the same series of measurements.
    """

    id: str
    machine: str
    model: str
    size: tuple[tuple[str, int], ...]
    guided: bool
    degrees: tuple[int, ...]
    steps: int
    compiled: bool
    scope: str
    newest: bool
    norms: bool
    source: str
    seconds: float

    @property
    def ranks(self) -> int:
        """The number of ranks of the configuration."""
        return math.prod(self.degrees)

    @property
    def copied(self) -> tuple[int, float]:
        """Copies from the host in a step, and their bytes: before version 0.32, Diffusers kept some tables there."""
        ulysses, ring, _, stages, _ = self.degrees
        copies, each = TABLES.get(self.model, (0, 0))
        tokens = math.prod(value for name, value in self.size if name in ("height", "width")) / 16**2
        return copies, copies * each * tokens / (ulysses * ring * stages)

    @property
    def counted(self) -> tuple[Any, ...]:
        """The values that a rehearsal depends on."""
        return self.model, self.size, self.guided, self.degrees

    @property
    def group(self) -> tuple[Any, ...]:
        """The key of points that differ only in their degrees."""
        return self.source, self.machine, self.model, self.size, self.steps, self.compiled, self.scope

    @property
    def name(self) -> str:
        """The configuration in words, without degrees of 1."""
        return " x ".join(f"{name} {n}" for name, n in zip(DEGREES, self.degrees, strict=True) if n > 1) or "1 rank"

    def arguments(self, steps: int) -> xFuserArgs:
        """The arguments to rehearse, with this many steps."""
        ulysses, ring, cfg, stages, tensor = self.degrees
        return xFuserArgs(
            model=self.model, prompt="a", dtype="bf16", num_inference_steps=steps, ulysses_degree=ulysses,
            ring_degree=ring, use_cfg_parallel=cfg == 2, pipefusion_parallel_degree=stages,
            tensor_parallel_degree=tensor, do_classifier_free_guidance=self.guided,
            negative_prompt="a" if self.guided else "", **dict(self.size),
        )  # fmt: skip


def read(folder: str) -> tuple[list[Point], Counter]:
    """Read the comparable measurements of time, and the numbers of rows left out by reason."""
    found, left = [], Counter()
    for name in FILES:
        with open(os.path.join(folder, name), encoding="utf-8") as file:
            rows = [row for row in csv.DictReader(file) if row["what"] in ("latency_s", "per_step_s")]
        for row in rows:
            reason = _unlike(row)
            if reason:
                left[reason] += 1
            else:
                found.append(_point(row))
    return found, left


def machine_name(row: dict[str, str]) -> str | None:
    """The data sheet of a published row's machine; of two names with a slash, the first that has a data sheet."""
    return next(filter(None, map(sheet_of, row["gpu"].split("/"))), None)


def _unlike(row: dict[str, str]) -> str | None:
    """Why a row cannot be compared; None if it can."""
    if row["cache"] not in ("", "none") or row["quant"] not in ("", "none") or "age" in row["attention_backend"]:
        return "step caches, quantised weights or attention"
    if not machine_name(row):
        return "machine unstated, or not known"
    if not named(row["model"]):
        return "model not known"
    whole = row["source_repo"].startswith("Wan-Video")  # offloads whole models, between the steps
    for word, reason in UNLIKE.items():
        if word in row["notes"] and not (reason == "offload" and whole):
            return reason
    degrees = [int(row[name] or 1) for name in (*DEGREES, "dp")]
    if math.prod(degrees) != int(row["n_gpus"]):
        return "degrees unstated"
    if row["scope"] not in ("e2e", "denoise", "step", "per_step", "transformer_forward"):
        return "of a part alone"
    if row["scope"] in ("e2e", "denoise") and row["what"] == "latency_s" and not row["steps"]:
        return "steps unstated"
    known = row["height"] or any(word in row["notes"] for word in ("CLI default", "pipeline defaults"))
    return None if known or row["scope"] == "transformer_forward" else "size unstated"


def _point(row: dict[str, str]) -> Point:
    model = named(row["model"])
    usual = published()[model]["call"]
    size = tuple((name, int(row[field] or usual[name])) for field, name in FIELDS.items() if name in usual)
    source = f"{row['source_repo']} {os.path.basename(row['source_path_or_thread'])}"
    is_step = row["what"] == "per_step_s" or row["scope"] in ("step", "per_step", "transformer_forward")
    return Point(
        id=row["id"],
        machine=machine_name(row),
        model=model,
        size=size,
        guided=_guided(row, published()[model]["guided"]),
        degrees=tuple(int(row[name] or 1) for name in DEGREES),
        steps=50 if "suggests 50" in row["notes"] else int(row["steps"] or 2),
        compiled=row["compile"] == "1",
        scope="step" if is_step else "denoise" if row["scope"] == "denoise" else "call",
        newest="FA3" in row["notes"] or row["attention_backend"] in NEWEST,
        norms=any(word in source for word in RECENT),
        source=source,
        seconds=float(row["value"]),
    )


def _guided(row: dict[str, str], usually: bool) -> bool:
    """Whether classifier-free guidance ran; if not stated, a run with few steps counts as distilled (unguided)."""
    if row["guidance"] in ("true", "false"):
        return row["guidance"] == "true"
    return usually and row["guidance"] != "distilled" and not int(row["steps"] or 20) <= DISTILLED
