"""How PipeFusion refuses what it cannot compute."""

from typing import NoReturn


def refuse(what: str, why: str, instead: str = "Use Ulysses, ring, CFG or data parallelism") -> NoReturn:
    """Raise the ValueError that says what is not supported, why, and what to do instead."""
    raise ValueError(f"PipeFusion does not support {what}: {why}. {instead}")
