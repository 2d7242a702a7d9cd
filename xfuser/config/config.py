"""The checked configuration of a run."""

import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch

from xfuser.core.checks import check_count

ASYNCHRONOUS = "corrected_async_gn"  # DistriFusion's default
MODES = {
    ASYNCHRONOUS: "other ranks' rows are of the previous step; group norms correct its moments by this rank's change",
    "stale_gn": "other ranks' rows are stale; group norms use their stale moments and this rank's current ones",
    "sync_gn": "other ranks' rows are stale; group norms wait for current moments",
    "separate_gn": "other ranks' rows are stale; group norms use only this rank's rows",
    "no_sync": "other ranks' rows remain those of the last synchronous step",
    "full_sync": "every step waits for the other ranks' rows: equal to one rank",
}
OUTPUT_TYPES = ("pil", "pt", "np", "latent")


class Degree(NamedTuple):
    """The names of one degree of parallelism."""

    field: str  # in ParallelConfig
    flag: str
    group: str  # argument of initialize_model_parallel


DEGREES = {
    "cfg": Degree("cfg_degree", "use_cfg_parallel", "classifier_free_guidance_degree"),
    "dp": Degree("dp_degree", "data_parallel_degree", "data_parallel_degree"),
    "pipefusion": Degree("pp_degree", "pipefusion_parallel_degree", "pipeline_parallel_degree"),
    "ulysses": Degree("ulysses_degree", "ulysses_degree", "ulysses_degree"),
    "ring": Degree("ring_degree", "ring_degree", "ring_degree"),
    "tensor": Degree("tp_degree", "tensor_parallel_degree", "tensor_parallel_degree"),
    "distrifusion": Degree("distrifusion_degree", "distrifusion_degree", "ring_degree"),
    "naive": Degree("naive_patch_degree", "naive_patch_degree", "ring_degree"),
}
PATCH_METHODS = ("distrifusion", "naive")  # each rank computes a part of the image
BESIDE_PATCHES = [DEGREES[method].flag for method in ("dp", "cfg", "tensor")]
SPLIT_SCHEMES = {"tensor_parallel_degree": ("row", "col"), "naive_patch_degree": ("row", "col", "alternate")}


def check_known(name: str, value: Any, known: Iterable[Any]) -> None:
    """Raise a ValueError unless a value is one of the known values."""
    known = list(known)
    if value not in known:
        raise ValueError(f"{name}={value!r} is unknown; known are {', '.join(map(str, known))}")


def in_bytes(size: str) -> int:
    """Parse ``"24GB"`` or ``"22.5 GiB"`` into a number of bytes.

    Raises:
        ValueError: the text is not a size.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMGT])(i?)B?", size, flags=re.IGNORECASE)
    if not found:
        raise ValueError(f"memory={size!r} is not a size: give a number with a unit, such as 24GB or 22.5GiB")
    number, unit, binary = found.groups()
    return int(float(number) * (1024 if binary else 1000) ** (" KMGT".index(unit.upper())))


@dataclass(frozen=True)
class ModelConfig:
    """Which pipeline to load: a local folder or a hub name, and how."""

    model: str
    download_dir: str | None = None
    trust_remote_code: bool = False


@dataclass
class RuntimeConfig:
    """How the pipeline runs on a device. Not frozen: scripts set ``dtype`` after the configuration is made."""

    dtype: torch.dtype
    seed: int = 42
    output_type: str = "pil"
    attention_backend: str = "auto"
    use_torch_compile: bool = False
    warmup_steps: int = 1
    use_fbcache: bool = False
    use_teacache: bool = False
    cache_threshold: float | None = None  # None: the cache's default
    use_parallel_vae: bool = False
    vae_engine: str = "auto"
    vae_split: str = "auto"
    vae_chunk_rows: int | str | None = None
    text_encoder: str = "replicate"
    memory: int | None = None  # None: the accelerator's memory, known once the rank has selected its device
    use_fp8_t5_encoder: bool = False
    enable_model_cpu_offload: bool = False
    enable_sequential_cpu_offload: bool = False
    enable_tiling: bool = False
    enable_slicing: bool = False

    @property
    def caches(self) -> bool:
        """Whether a flag enables a cache."""
        return self.use_fbcache or self.use_teacache


@dataclass(frozen=True)
class ParallelConfig:
    """The degrees of parallelism, whose product is the number of ranks."""

    dp_degree: int = 1
    cfg_degree: int = 1
    ulysses_degree: int = 1
    ring_degree: int = 1
    pp_degree: int = 1
    tp_degree: int = 1
    num_pipeline_patch: int = 1
    attn_layer_num_for_pp: tuple[int, ...] | None = None
    distrifusion_degree: int = 1
    distrifusion_mode: str = ASYNCHRONOUS
    naive_patch_degree: int = 1
    split_scheme: str | None = None
    tensor_parallel_text_encoder: bool = False
    fully_shard_degree: int = 1

    @property
    def sp_degree(self) -> int:
        """Number of ranks over which any method divides an image's rows."""
        return self.ulysses_degree * self.ring_degree * self.distrifusion_degree * self.naive_patch_degree

    @property
    def tensor_scheme(self) -> str | None:
        """How tensor parallelism divides layers; None for pairs. With naive patches, ``split_scheme`` is theirs."""
        return self.split_scheme if self.naive_patch_degree == 1 else None

    @property
    def group_degrees(self) -> dict[str, int]:
        """The arguments of ``initialize_model_parallel``."""
        groups = dict.fromkeys((names.group for names in DEGREES.values()), 1)
        for names in DEGREES.values():
            groups[names.group] *= getattr(self, names.field)
        return groups

    @property
    def world_size(self) -> int:
        """Number of ranks: the product of the degrees."""
        return math.prod(self.degrees().values())

    @property
    def sequenced(self) -> bool:
        """Whether ranks hold shards of the token sequence."""
        return self.ulysses_degree * self.ring_degree > 1

    @property
    def divides(self) -> bool:
        """Whether each rank keeps only a part of the transformer's weights."""
        return self.pp_degree * self.tp_degree * self.fully_shard_degree > 1

    @property
    def pipelined(self) -> bool:
        """Whether PipeFusion is used, including as a preview on one rank."""
        return self.pp_degree > 1 or self.num_pipeline_patch > 1

    @property
    def patched(self) -> bool:
        """Whether each rank computes a part of the image, using stale activations of other ranks or none."""
        return self.distrifusion_degree > 1 or self.naive_patch_degree > 1

    def degrees(self) -> dict[str, int]:
        """The degrees by flag."""
        return {names.flag: getattr(self, names.field) for names in DEGREES.values()}

    def check(self, world_size: int) -> None:
        """Raise a ValueError unless the degrees multiply to ``world_size`` and are compatible."""
        for flag, degree in self.degrees().items():
            check_count(flag, degree)
        check_count("num_pipeline_patch", self.num_pipeline_patch)
        if self.world_size != world_size:
            given = " * ".join(f"{flag}={degree}" for flag, degree in self.degrees().items() if degree > 1)
            raise ValueError(
                f"the degrees {given or '(all 1)'} multiply to {self.world_size}, but {world_size} ranks run."
                f" With {world_size} rank{'s' * (world_size > 1)} you can choose: {legal_choices(world_size)}"
            )
        layers, stages = self.attn_layer_num_for_pp, self.pp_degree
        if layers and (len(layers) != stages or not all(isinstance(count, int) and count > 0 for count in layers)):
            raise ValueError(
                f"attn_layer_num_for_pp={list(layers)} must name the blocks of each of the {stages} stages of"
                f" pipefusion_parallel_degree={stages}: one number per stage, each 1 or more"
            )
        self._check_patches()
        self._check_weights()

    def _check_weights(self) -> None:
        """Check the division of weights: ``fully_shard_degree`` needs ranks that run the same blocks together."""
        if self.tensor_parallel_text_encoder and self.tp_degree == 1:
            raise ValueError("tensor_parallel_text_encoder requires tensor_parallel_degree above 1")
        degree, replica = self.fully_shard_degree, self.world_size // self.dp_degree
        if degree not in (1, replica):
            allowed = " or ".join(map(str, sorted({1, replica})))
            raise ValueError(
                f"fully_shard_degree={degree!r} must be {allowed}: one rank, or all of a data-parallel replica"
            )
        for method in ("pipefusion", "tensor"):
            if degree > 1 and getattr(self, DEGREES[method].field) > 1:
                flag = DEGREES[method].flag
                raise ValueError(f"fully_shard_degree={degree} and {flag} both divide the weights: choose one")

    def _check_patches(self) -> None:
        """Check the division of the image: DistriFusion, naive patches and other methods exclude each other."""
        check_known("distrifusion_mode", self.distrifusion_mode, MODES)
        degrees = self.degrees() | {"num_pipeline_patch": self.num_pipeline_patch}
        dividing = [f"{flag}={n}" for flag, n in degrees.items() if n > 1 and flag not in BESIDE_PATCHES]
        if self.patched and len(dividing) > 1:
            raise ValueError(
                f"{' and '.join(dividing)} divide the image in ways that exclude each other: choose one."
                f" {' and '.join(DEGREES[method].flag for method in PATCH_METHODS)} go with {', '.join(BESIDE_PATCHES)}"
            )
        if self.split_scheme is None:
            return
        method = "naive_patch_degree" if self.naive_patch_degree > 1 else "tensor_parallel_degree"
        if degrees[method] == 1:
            raise ValueError(
                f"split_scheme={self.split_scheme!r} requires tensor_parallel_degree or naive_patch_degree"
            )
        check_known(f"{method}: split_scheme", self.split_scheme, SPLIT_SCHEMES[method])

    def __str__(self) -> str:
        patched = {"distrifusion": self.distrifusion_degree, "naive": self.naive_patch_degree}
        return (
            f"dp{self.dp_degree}_cfg{self.cfg_degree}_ulysses{self.ulysses_degree}_ring{self.ring_degree}"
            f"_tp{self.tp_degree}_pp{self.pp_degree}_patch{self.num_pipeline_patch}"
            + "".join(f"_{name}{degree}" for name, degree in patched.items() if degree > 1)
        )


def legal_degrees(world_size: int) -> list[dict[str, int]]:
    """All combinations of degrees whose product is this world size, by method name."""
    divisors = [n for n in range(1, world_size + 1) if world_size % n == 0]
    found: list[dict[str, int]] = [{}]
    for method in (method for method in DEGREES if method not in PATCH_METHODS):
        found = [
            degrees | {method: n}
            for degrees in found
            for n in divisors
            if world_size % (math.prod(degrees.values()) * n) == 0 and (n <= 2 or method != "cfg")
        ]
    return [degrees for degrees in found if math.prod(degrees.values()) == world_size]


def in_words(degrees: dict[str, int]) -> str:
    """A combination of degrees as text, by method name."""
    return " x ".join(f"{name} {n}" for name, n in degrees.items() if n > 1) or "all degrees 1"


def legal_choices(world_size: int, limit: int = 16) -> str:
    """The combinations of degrees for this world size as text, the shortest first."""
    choices = sorted(map(in_words, legal_degrees(world_size)), key=len)
    more = f", and {len(choices) - limit} more" if len(choices) > limit else ""
    return "; ".join(choices[:limit]) + more


@dataclass(frozen=True)
class EngineConfig:
    """Model, runtime and parallel configuration of a wrapped pipeline."""

    model_config: ModelConfig
    runtime_config: RuntimeConfig
    parallel_config: ParallelConfig

    @property
    def world_size(self) -> int:
        """Number of ranks: the product of the degrees."""
        return self.parallel_config.world_size


def checked_config(engine_config: Any) -> EngineConfig:
    """The configuration; raises a ValueError for what is often passed in its place."""
    if not isinstance(engine_config, EngineConfig):
        raise ValueError(
            f"engine_config is of the type {type(engine_config).__name__}, and must be the first result of"
            " xFuserArgs(...).create_config()"
        )
    return engine_config


@dataclass(frozen=True)
class InputConfig:
    """What to generate. Sizes are in pixels; None means the pipeline's default."""

    prompt: str | list[str] = ""
    negative_prompt: str | list[str] = ""
    height: int | None = None
    width: int | None = None
    num_frames: int | None = None
    num_inference_steps: int | None = 20
    guidance_scale: float = 3.5
    max_sequence_length: int | None = 256
    use_resolution_binning: bool = True
    do_classifier_free_guidance: bool = True
    use_cfg_parallel: bool = False
    img_file_path: str | None = None
    seed: int = 42
    output_type: str = "pil"

    @property
    def batch_size(self) -> int:
        """Number of prompts."""
        return 1 if isinstance(self.prompt, str) else len(self.prompt)

    def check(self) -> None:
        """Raise a ValueError for values that no pipeline accepts."""
        for name in ("height", "width", "num_frames", "num_inference_steps", "max_sequence_length"):
            if getattr(self, name) is not None:
                check_count(name, getattr(self, name))
        if not -(2**63) <= self.seed < 2**64:
            raise ValueError(f"seed={self.seed} must fit into 64 bits")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale={self.guidance_scale} must be a finite number")
        check_known("output_type", self.output_type, OUTPUT_TYPES)
        for name in ("prompt", "negative_prompt"):
            value = getattr(self, name)
            texts = [value] if isinstance(value, str) else value
            if not isinstance(texts, list | tuple) or not all(isinstance(text, str) for text in texts):
                raise ValueError(f"{name}={value!r} must be a text or a list of texts")
        count = 1 if isinstance(self.negative_prompt, str) else len(self.negative_prompt)
        if count not in (0, 1, self.batch_size):
            raise ValueError(
                f"{count} negative prompts for {self.batch_size} prompts: give one for all, or one for each"
            )
