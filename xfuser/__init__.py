"""xfuser: existing Diffusers pipelines on many devices.

engine_config, input_config = xFuserArgs.from_cli_args(args).create_config()
pipe = xDiTParallel(pipe, engine_config, input_config)  # then call pipe(...) as before
"""

import importlib
from typing import TYPE_CHECKING, Any

from xfuser.core import distributed

if TYPE_CHECKING:
    from xfuser.config import EngineConfig, FlexibleArgumentParser, InputConfig, xFuserArgs
    from xfuser.loading import load_pipeline
    from xfuser.parallel import xDiTParallel

__version__ = "1.0.0"

_LAZY = {
    "EngineConfig": "xfuser.config",
    "FlexibleArgumentParser": "xfuser.config",
    "InputConfig": "xfuser.config",
    "load_pipeline": "xfuser.loading",
    "xDiTParallel": "xfuser.parallel",
    "xFuserArgs": "xfuser.config",
}

__all__ = [
    "EngineConfig",
    "FlexibleArgumentParser",
    "InputConfig",
    "distributed",
    "load_pipeline",
    "xDiTParallel",
    "xFuserArgs",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    raise AttributeError(f"module 'xfuser' has no attribute {name!r}")
