"""Files of results: written whole or not at all."""

import json
import os
import tempfile
from collections.abc import Callable
from typing import Any


def output_folder(path: str) -> str:
    """Make the folder; raise a ValueError where nothing can be written there."""
    try:
        os.makedirs(path, exist_ok=True)
        with tempfile.TemporaryFile(dir=path):
            return path
    except OSError as error:
        raise ValueError(f"output_dir={path!r}: nothing can be written there ({error})") from None


def replace_file(path: str, write: Callable[[str], None]) -> str:
    """Let ``write`` write a file beside ``path``, and give it that name when it is whole; returns the path."""
    stem, ending = os.path.splitext(path)
    part = f"{stem}.part{os.getpid()}{ending}"
    try:
        write(part)
        os.replace(part, path)
    finally:
        if os.path.exists(part):
            os.remove(part)
    return path


def write_text(path: str, text: str) -> str:
    def write(part: str) -> None:
        with open(part, "w", encoding="utf-8") as file:
            file.write(text)

    return replace_file(path, write)


def write_json(path: str, value: Any) -> str:
    return write_text(path, json.dumps(value, indent=1) + "\n")
