"""The legal combinations of degrees for a number of ranks, and the memory that each takes."""

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

    def text(self, memory: int | None) -> str:
        """The row in words and numbers of GB."""
        if self.refusal:
            return f"no: {self.refusal}"
        numbers = "  ".join(f"{self.needs[name] / 1e9:{len(name)}.4g}" for name in COLUMNS)
        if memory is None or self.fits(memory):
            return numbers
        weights = sum(self.needs[name] for name in COLUMNS[:3])
        alone = "the weights alone" if weights > memory else "weights and activations"
        return f"{numbers}  no: {alone} are above {memory / 1e9:.4g} GB"


# Decisions need contents, which a rehearsal lacks; what a cache keeps is one activation of each stream and call.
UNCACHED = {"use_fbcache": False, "use_teacache": False, "cache_threshold": None, "rel_l1_thresh": None}


def plan(args: xFuserArgs, world_size: int) -> list[Row]:
    """What every legal combination of degrees for so many ranks needs; ``args`` has all but the degrees.

    Raises:
        ValueError: the pipeline is not found.
    """
    args = replace(args, **UNCACHED)
    base = args if shipped_folder(args.model) else replace(args, model=configs_of(args.model, args.download_dir))
    with alone_of(world_size):
        return [_row(base, degrees, world_size) for degrees in legal_degrees(world_size)]


def _row(args: xFuserArgs, degrees: dict[str, int], world_size: int) -> Row:
    name = in_words(degrees)
    flags = {DEGREES[method].flag: n for method, n in degrees.items()} | {"use_cfg_parallel": degrees["cfg"] == 2}
    # Where weights are is computed from sizes; what the call does with them does not depend on it.
    plain = {"text_encoder": "replicate", "fully_shard_degree": 1}
    warmup = args.warmup_steps if degrees["pipefusion"] > 1 else 0
    shards = world_size // degrees["dp"] if args.fully_shard_degree > 1 else 1
    try:
        replace(args, **flags, fully_shard_degree=shards).checked()
        memory = rehearse(*replace(args, **flags, **plain, num_inference_steps=warmup + 2).checked())
    except (ValueError, RuntimeError) as error:
        return Row(name, {}, str(error).splitlines()[0])
    return Row(name, needs_of(memory, args.text_encoder, world_size, shards))


def needs_of(memory: Memory, mode: str, world_size: int, shards: int) -> dict[str, int]:
    """Bytes by the names of ``COLUMNS``, with text encoders in this mode and transformers in so many shards."""
    groups: dict[str, list[str]] = {"transformer": [], "text encoders": [], "other weights": []}
    resident, active = dict(memory.weights), dict(memory.live)  # active: while a component computes
    for name, weight in memory.weights.items():
        is_encoder = name.startswith(PREFIX)
        kind = "transformer" if name in memory.transformers else "text encoders" if is_encoder else "other weights"
        groups[kind].append(name)
        ranks = shards if kind == "transformer" else world_size if is_encoder and mode == "shard" else 1
        units = memory.units[name] if ranks > 1 else []
        if is_encoder and mode == "offload":
            resident[name] = 0
            active[name] += weight
        elif units:
            resident[name] = weight - sum(units) + sum(-(-unit // ranks) for unit in units)
            active[name] += GATHERED * max(units)
    needs = {kind: sum(resident[name] for name in names) for kind, names in groups.items()} | {"kept": memory.kept}
    for column, kind in {"encode": "text encoders", "denoise": "transformer", "VAE": "other weights"}.items():
        needs[column] = max((active[name] for name in groups[kind]), default=0)
    return needs | {"peak": sum(resident.values()) + max(active.values())}
