"""The legal combinations of degrees for a number of ranks, and the memory that each takes."""

import math
from dataclasses import dataclass, replace

from xfuser.config import xFuserArgs
from xfuser.config.args import shipped_folder
from xfuser.config.config import DEGREES, in_words, legal_degrees
from xfuser.planner.rehearsal import Memory, alone_of, configs_of, rehearse
from xfuser.weights.text_encoders import PREFIX

COLUMNS = ("transformer", "text encoders", "other weights", "kept", "encode", "denoise", "VAE", "peak")
GATHERED = 2  # units at a time: the one that computes, and the one that is fetched meanwhile


@dataclass
class Row:
    """A combination of degrees, and the bytes that a rank needs by the names of ``COLUMNS``; or why it cannot be."""

    name: str
    needs: dict[str, int]
    refusal: str = ""

    @property
    def peak(self) -> float:
        return self.needs.get("peak", float("inf"))

    def fits(self, memory: int) -> bool:
        return self.peak <= memory

    def told(self, memory: int | None) -> str:
        """The row in words and numbers of GB."""
        if self.refusal:
            return f"no: {self.refusal}"
        numbers = "  ".join(f"{self.needs[name] / 1e9:{len(name)}.4g}" for name in COLUMNS)
        if memory is None or self.fits(memory):
            return numbers
        weights = sum(self.needs[name] for name in COLUMNS[:3])
        alone = "the weights alone" if weights > memory else "weights and activations"
        return f"{numbers}  no: {alone} are above {memory / 1e9:.4g} GB"


def plan(args: xFuserArgs, world_size: int) -> list[Row]:
    """What the legal combinations of degrees for so many ranks take; ``args`` says all but the degrees.

    Raises:
        ValueError: there is no such pipeline.
    """
    base = args if shipped_folder(args.model) else replace(args, model=configs_of(args.model, args.download_dir))
    with alone_of(world_size):
        return [_row(base, degrees) for degrees in legal_degrees(world_size)]


def _row(args: xFuserArgs, degrees: dict[str, int]) -> Row:
    name = in_words(degrees)
    asked = {DEGREES[method].flag: n for method, n in degrees.items()} | {"use_cfg_parallel": degrees["cfg"] == 2}
    # Where weights are is computed from sizes; what the call does with them does not depend on it.
    plain = {"text_encoder": "replicate", "fully_shard_degree": 1}
    warmup = args.warmup_steps if degrees["pipefusion"] > 1 else 0
    try:
        shards = math.prod(degrees.values()) // degrees["dp"] if args.fully_shard_degree > 1 else 1
        replace(args, **asked, fully_shard_degree=shards).checked()
        configs = replace(args, **asked, **plain, num_inference_steps=warmup + 2).checked()
        memory = rehearse(*configs)
    except (ValueError, RuntimeError) as error:
        return Row(name, {}, str(error).splitlines()[0])
    return Row(name, needs_of(memory, args.text_encoder, math.prod(degrees.values()), shards))


def needs_of(memory: Memory, mode: str, world_size: int, shards: int) -> dict[str, int]:
    """Bytes by the names of ``COLUMNS``, with text encoders in this mode and transformers in so many shares."""
    encoders = {name: weight for name, weight in memory.weights.items() if name.startswith(PREFIX)}
    transformers = memory.transformers
    resident = dict(encoders)
    busy = dict.fromkeys(memory.weights, 0)  # on top, while a component computes
    if mode == "offload":
        resident, busy = dict.fromkeys(encoders, 0), busy | encoders
    for name in (*(encoders if mode == "shard" else ()), *transformers):
        ranks = world_size if name in encoders else shards
        resident[name], busy[name] = shared(memory.weights[name], memory.units[name], ranks)
    others = {name: resident.pop(name, weight) for name, weight in memory.weights.items() if name not in encoders}
    standing = sum(resident.values()) + sum(others.values())
    peaks = {name: standing + busy[name] + live for name, live in memory.live.items()}
    told = {
        "transformer": sum(others[name] for name in transformers),
        "text encoders": sum(resident.values()),
        "other weights": sum(weight for name, weight in others.items() if name not in transformers),
        "kept": memory.kept,
        "encode": max((memory.live[name] + busy[name] for name in encoders), default=0),
        "denoise": max(memory.live[name] + busy[name] for name in transformers),
        "VAE": max((memory.live[name] for name in others if name not in transformers), default=0),
    }
    return told | {"peak": max(peaks.values())}


def shared(weight: int, units: list[int], ranks: int) -> tuple[int, int]:
    """Bytes that a rank holds of a module whose units are in shares, and what it gathers on top."""
    if ranks == 1 or not units:
        return weight, 0
    return weight - sum(units) + sum(-(-unit // ranks) for unit in units), GATHERED * max(units)
