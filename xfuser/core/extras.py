"""Optional packages, looked for when they are used."""

import importlib
from typing import Any


def extra(module: str, purpose: str) -> Any:
    """The module, or a ValueError that says what it is for and how to get it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ValueError(f'{purpose} needs {package}: pip install "xfuser[bench]" ({error})') from None
