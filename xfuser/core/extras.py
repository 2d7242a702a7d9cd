"""Optional packages, imported when they are used."""

import importlib
from typing import Any


def extra(module: str, purpose: str) -> Any:
    """Import a module. If it is missing, raise a ValueError that gives its purpose and how to install it."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        package = module.partition(".")[0]
        raise ValueError(f'{purpose} needs {package}: pip install "xfuser[bench]" ({error})') from None
