"""Checks of values that callers pass."""

from numbers import Integral
from typing import Any


def check_count(name: str, value: Any, least: int = 1) -> None:
    """Raise a ValueError unless a value is a whole number of ``least`` or more; a bool is none."""
    if not isinstance(value, Integral) or isinstance(value, bool) or value < least:
        raise ValueError(f"{name}={value!r} must be a whole number of {least} or more")
