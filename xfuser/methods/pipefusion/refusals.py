"""The error that PipeFusion raises for what it does not support."""

from typing import NoReturn


def refuse(what: str, why: str, change: str = "", others: str = "Ulysses, ring, CFG or data parallelism") -> NoReturn:
    """Raise a ValueError that states what is not supported, why, what to change, and which methods support it."""
    advice = f"{change}, or use {others}" if change else f"Use {others}"
    raise ValueError(f"PipeFusion does not support {what}: {why}. {advice}")
