"""The legal combinations of degrees for a number of ranks, with the memory and time of each."""

from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from functools import partial

from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException

from xfuser.config import xFuserArgs
from xfuser.config.args import shipped_folder
from xfuser.config.config import DEGREES, in_words, legal_degrees
from xfuser.planner import forks
from xfuser.planner.estimate import Estimate, counted, estimate
from xfuser.planner.machines import Machine
from xfuser.planner.published import configs_of, named
from xfuser.planner.rehearsal import Rehearsed, Source, alone_of, rehearse
from xfuser.planner.trace import Message
from xfuser.weights.text_encoders import PREFIX

COLUMNS = ("transformer", "text encoders", "other weights", "kept", "encode", "denoise", "VAE", "peak")
GATHERED = 2  # units held at a time: the one in use, and the next one, which is being gathered
OBJECTIVES = ("latency", "throughput", "memory")


@dataclass
class Row:
    """A combination of degrees, and the bytes that a rank needs by the names of ``COLUMNS``; or why it cannot run.

    Attributes:
        degrees: by method; ``groups``: number of groups of this many ranks, each of which generates separate images.
        told: the counts; ``time``: the estimate for a machine, if one is given.
    """

    name: str
    needs: dict[str, int]
    refusal: str = ""
    degrees: dict[str, int] = field(default_factory=dict)
    groups: int = 1
    told: Rehearsed | None = None
    time: Estimate | None = None

    @property
    def peak(self) -> float:
        """Bytes on the rank that needs most; infinite where the row was not counted."""
        return self.needs.get("peak", float("inf"))

    @property
    def exact(self) -> bool:
        """Whether the image equals that of one rank."""
        return self.degrees.get("pipefusion", 1) == 1

    @property
    def seconds(self) -> float:
        """Seconds of a call; infinite where time was not counted."""
        return self.time.seconds if self.time else float("inf")

    def fits(self, memory: int | None) -> bool:
        """Whether the row fits on a device with this many bytes; always true for None."""
        return memory is None or self.peak <= memory

    def value(self, objective: str) -> float:
        """The value to minimize."""
        return {"latency": self.seconds, "throughput": self.seconds / self.groups, "memory": self.peak}[objective]

    def text(self, memory: int | None) -> str:
        """The row as text, in GB."""
        if self.refusal:
            return f"no: {self.refusal}"
        numbers = "  ".join(f"{self.needs[name] / 1e9:{len(name)}.4g}" for name in COLUMNS)
        return numbers if self.fits(memory) else f"{numbers}  no: {self.excess(memory)}"

    def excess(self, memory: int) -> str:
        """Why the row does not fit."""
        weights = sum(self.needs[name] for name in COLUMNS[:3])
        alone = "the weights alone" if weights > memory else "weights and activations"
        return f"{alone} are above {memory / 1e9:.4g} GB"


# A cache decides by values, which a rehearsal lacks. It keeps only one activation per stream and call.
UNCACHED = {"use_fbcache": False, "use_teacache": False, "cache_threshold": None, "rel_l1_thresh": None}


def plan(
    args: xFuserArgs,
    world_size: int,
    machine: Machine | None = None,
    compiled: bool = False,
    choices: Iterable[dict[str, int]] | None = None,
    source: Source | None = None,
    exact: bool = False,
) -> list[Row]:
    """Count the memory, and with ``machine`` the time, of combinations of degrees; ``args`` has all but the degrees.

    Args:
        machine: the machine to estimate time for; if None, only memory is counted.
        compiled: whether blocks are compiled.
        choices: the combinations; defaults to all legal ones.
        source: state to share with other calls of this function.
        exact: refuse configurations whose image differs from that of one rank.

    Raises:
        ValueError: the pipeline was not found.
    """
    base = located(replace(args, **UNCACHED))
    source = source or source_of(base)
    with alone_of(world_size):
        choices = legal_degrees(world_size) if choices is None else choices
        one = partial(_row, base, world_size=world_size, machine=machine, compiled=compiled, source=source, exact=exact)
        return forks.each(one, list(choices), lambda row: row.told is not None)


def located(args: xFuserArgs) -> xFuserArgs:
    """The arguments with a local or published model; for others, configurations are downloaded from the hub."""
    if shipped_folder(args.model) or named(args.model):
        return args
    return replace(args, model=configs_of(args.model, args.download_dir))


def source_of(args: xFuserArgs) -> Source:
    """The state that rehearsals of this pipeline share."""
    shards = min(1, args.fully_shard_degree)  # higher degrees, and divided encoders, are checked with each row's ranks
    alone = {"fully_shard_degree": shards, "tensor_parallel_text_encoder": False}
    engine = replace(args, use_torch_compile=False, **alone).checked()[0]
    return Source(engine.model_config.model, engine.runtime_config.dtype)


def with_degrees(args: xFuserArgs, degrees: dict[str, int]) -> xFuserArgs:
    """The arguments with these degrees, which are given by method."""
    flags = {DEGREES[method].flag: n for method, n in degrees.items()}
    return replace(args, **flags | {"use_cfg_parallel": degrees.get("cfg", 1) == 2})


def _row(
    args: xFuserArgs,
    degrees: dict[str, int],
    world_size: int,
    machine: Machine | None,
    compiled: bool,
    source: Source,
    exact: bool,
) -> Row:
    name = in_words(degrees)
    # needs_of derives the placement of weights from sizes; the call itself does not depend on it.
    plain = {"text_encoder": "replicate", "fully_shard_degree": 1, "use_torch_compile": False}
    stages = degrees.get("pipefusion", 1)
    if exact and stages > 1:
        return Row(name, {}, "not exact: its images differ a little", degrees)
    warmup = args.warmup_steps if stages > 1 else 0
    shards = world_size // degrees.get("dp", 1) if args.fully_shard_degree > 1 else 1
    try:
        wanted = with_degrees(args, degrees)
        _, inputs = replace(wanted, fully_shard_degree=shards, use_torch_compile=False).checked()
        if machine and degrees.get("dp", 1) > inputs.batch_size:
            raise ValueError(
                f"data_parallel_degree: more replicas than the {inputs.batch_size} images of the batch;"
                " give more prompts, or ask for --objective throughput"
            )
        steps = source.steps(stages, warmup, degrees.get("cfg", 1))
        told = rehearse(*replace(wanted, **plain, num_inference_steps=steps).checked(), source)
    except Exception as error:  # also from the pipeline's own code; other combinations may still work
        return Row(name, {}, _reason(error), degrees)
    row = Row(name, needs_of(told, args.text_encoder, world_size, shards), "", degrees, 1, told)
    if machine:
        synchronous = warmup * len(told.transformers)  # each has its own warm-up
        fetched = machine.link_seconds(_gathered(told, shards)) * told.forwards if shards > 1 else 0.0
        program = counted(told, compiled, machine.norms)
        row.time = estimate(program, machine, args.num_inference_steps, synchronous, compiled, fetched)
    return row


def _reason(error: Exception) -> str:
    """Why a combination cannot be counted, in one line."""
    told = str(error).partition("\n")[0]
    if isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return (
            f"the pipeline looks at the values of tensors ({told}), which a plan does not have: measure with xdit bench"
        )
    return told if isinstance(error, ValueError) else f"{type(error).__name__}: {told}"


def _gathered(told: Rehearsed, shards: int) -> Message:
    """The weights of the largest transformer as one message: they are gathered once per forward."""
    weight = max(sum(told.units[name]) for name in told.transformers)
    return Message(0, "all_gather", tuple(range(shards)), weight * (shards - 1) // shards)


def needs_of(told: Rehearsed, mode: str, world_size: int, shards: int) -> dict[str, int]:
    """Bytes by the names of ``COLUMNS``, for this mode of text encoders and this many shards of transformers."""
    groups: dict[str, list[str]] = {"transformer": [], "text encoders": [], "other weights": []}
    resident, active = dict(told.weights), dict(told.live)  # active: while a component computes
    for name, weight in told.weights.items():
        is_encoder = name.startswith(PREFIX)
        kind = "transformer" if name in told.transformers else "text encoders" if is_encoder else "other weights"
        groups[kind].append(name)
        ranks = shards if kind == "transformer" else world_size if is_encoder and mode == "shard" else 1
        units = told.units[name] if ranks > 1 else []
        if is_encoder and mode == "offload":
            resident[name] = 0
            active[name] += weight
        elif units:
            resident[name] = weight - sum(units) + sum(-(-unit // ranks) for unit in units)
            active[name] += GATHERED * max(units)
    needs = {kind: sum(resident[name] for name in names) for kind, names in groups.items()} | {"kept": told.kept}
    for column, kind in {"encode": "text encoders", "denoise": "transformer", "VAE": "other weights"}.items():
        needs[column] = max((active[name] for name in groups[kind]), default=0)
    return needs | {"peak": sum(resident.values()) + max(active.values())}
