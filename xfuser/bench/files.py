"""Result files, written atomically."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from xfuser.pipeline_io.media import write_whole


def write_file(path: str, write: Callable[[str], Any]) -> str:
    """Let ``write`` write the file, and create its folder if needed; returns the path."""
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    return write_whole(path, write)


def write_text(path: str, text: str) -> str:
    """Write a file in UTF-8 atomically; returns its path."""
    return write_file(path, lambda unfinished: Path(unfinished).write_text(text, encoding="utf-8"))


def write_json(path: str, value: Any) -> str:
    """Write a value as JSON atomically; returns the file's path."""
    return write_text(path, json.dumps(value, indent=1) + "\n")
