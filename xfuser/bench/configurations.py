"""The configurations to compare, written as flags of the library."""

import shlex
from dataclasses import dataclass, fields, replace

from xfuser.config import EngineConfig, FlexibleArgumentParser, xFuserArgs
from xfuser.core.checks import check_count

GROUPS = ("Parallel Processing Options", "Runtime Options")
OF_THE_RUN = ("seed", "output_type")  # runtime options that would change the image
DEGREES = [spec.name for spec in fields(xFuserArgs) if spec.name.endswith("_degree")]
PRESETS = {
    "methods": "each method on its own, on all ranks",
    "guided": "guidance on two groups of ranks, with each other method within them",
}


@dataclass(frozen=True)
class Configuration:
    """Flags as written, and the engine configuration that they define."""

    name: str
    engine: EngineConfig

    @property
    def ranks(self) -> int:
        """The number of ranks of the configuration."""
        return self.engine.world_size


def configurations(texts: list[str] | None, ranks: list[int], base: xFuserArgs) -> list[Configuration]:
    """Parse ``texts``: flags without their dashes, or names of presets, which are expanded for ``ranks``.

    ``{ranks}`` in a text stands for each number of ranks. None stands for all presets.

    Raises:
        ValueError: a text is neither a preset nor flags, or its flags are not supported here.
    """
    for count in ranks:
        check_count("ranks", count)
    found: dict[str, Configuration] = {}
    for text in PRESETS if texts is None else texts:
        for count in ranks if text in PRESETS or "{ranks}" in text else [0]:
            named = _preset(text, count, base) if text in PRESETS else [text.replace("{ranks}", str(count))]
            found |= {name: _configuration(name, base) for name in named}
    return list(found.values())


def _preset(name: str, ranks: int, base: xFuserArgs) -> list[str]:
    guided = name == "guided"
    degree = ranks // 2 if guided else ranks
    texts = [f"{flag}={degree}" for flag in DEGREES] if degree > 1 else []
    if guided and ranks % 2 == 0 and base.do_classifier_free_guidance:
        texts = ["use_cfg_parallel", *(f"use_cfg_parallel {text}" for text in texts)][: None if degree > 1 else 1]
    elif guided:
        return []
    several = isinstance(base.prompt, list) and len(base.prompt) > 1
    texts = [text for text in texts if several or "data_parallel" not in text]
    return [text for text in texts if _fits(text, ranks, base)]


def _fits(text: str, ranks: int, base: xFuserArgs) -> bool:
    """Whether a configuration is available here, and requires this number of ranks."""
    try:
        return _configuration(text, base).ranks == ranks
    except ValueError:
        return False


def _configuration(text: str, base: xFuserArgs) -> Configuration:
    flags = xFuserArgs.add_cli_args(FlexibleArgumentParser(prog="--configs", allow_abbrev=False, add_help=False))
    try:
        given = vars(
            flags.parse_args([f"--{word.lstrip('-')}" if _names(word) else word for word in shlex.split(text)])
        )
        changes = {spec.name: given[spec.name] for spec in fields(xFuserArgs) if given[spec.name] != spec.default}
        _check_groups(changes)
        return Configuration(text, replace(base, **changes).checked()[0])
    except ValueError as error:
        raise ValueError(
            f"configuration {text!r}: {error}. A configuration is written as flags of the library without their dashes"
            f' ("ulysses_degree=2 ring_degree=2"), or one of {", ".join(PRESETS)}'
        ) from None


def _names(word: str) -> bool:
    """Whether a word is a flag, not another value of the flag before it."""
    return not word.lstrip("-").replace(".", "").isdigit()


def _check_groups(changes: dict[str, object]) -> None:
    groups = {spec.name: spec.metadata["group"] for spec in fields(xFuserArgs)}
    for name in changes:
        if groups[name] not in GROUPS or name in OF_THE_RUN:
            raise ValueError(f"{name} is the same for all configurations: give it outside of --configs")
