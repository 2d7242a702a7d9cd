"""The flags of ``xdit serve`` beside those of ``xdit``."""

from dataclasses import dataclass, field, fields
from typing import Any


def _flag(default: Any, help: str) -> Any:
    return field(default=default, metadata={"help": help})


@dataclass
class Options:
    """What a server allows."""

    max_batch: int = _flag(8, "Pictures drawn together at most.")
    max_queue: int = _flag(256, "Pictures that may wait.")
    max_side: int = _flag(2048, "Largest height or width of a picture, in pixels.")
    hang_timeout: float = _flag(300.0, "Seconds without a step after which the ranks are started anew.")
    output_dir: str = _flag("results", "Folder for pictures that are asked for by URL.")

    def check(self) -> None:
        """Raise a ValueError for a number that is not positive."""
        for spec in fields(self):
            value = getattr(self, spec.name)
            if not isinstance(value, str) and not value > 0:
                raise ValueError(f"{spec.name}={value} must be more than 0")
