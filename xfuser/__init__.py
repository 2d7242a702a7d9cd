"""xfuser: run existing Diffusers pipelines on many devices.

engine_config, input_config = xFuserArgs.from_cli_args(args).create_config()
pipe = xDiTParallel(pipe, engine_config, input_config)  # then call pipe(...) as before
"""

import importlib
from typing import TYPE_CHECKING, Any

from xfuser.core import distributed as distributed

if TYPE_CHECKING:
    from xfuser.config import (
        EngineConfig as EngineConfig,
        FlexibleArgumentParser as FlexibleArgumentParser,
        InputConfig as InputConfig,
        xFuserArgs as xFuserArgs,
    )
    from xfuser.models.plan import ModelPlan as ModelPlan
    from xfuser.models.registry import register_plan as register_plan
    from xfuser.parallel import parallelize as parallelize, xDiTParallel as xDiTParallel
    from xfuser.testing.check import check_plan as check_plan
    from xfuser.weights.loading import load_pipeline as load_pipeline

__version__ = "1.0.0"

_LAZY = {
    "EngineConfig": "xfuser.config",
    "FlexibleArgumentParser": "xfuser.config",
    "InputConfig": "xfuser.config",
    "ModelPlan": "xfuser.models.plan",
    "check_plan": "xfuser.testing.check",
    "load_pipeline": "xfuser.weights.loading",
    "parallelize": "xfuser.parallel",
    "register_plan": "xfuser.models.registry",
    "xDiTParallel": "xfuser.parallel",
    "xFuserArgs": "xfuser.config",
}
__all__ = ["distributed", *_LAZY]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(importlib.import_module(_LAZY[name]), name)
    if name.startswith("xFuser") and name.endswith("Pipeline"):
        return importlib.import_module("xfuser.pipelines").pipeline_class(name)
    raise AttributeError(f"module 'xfuser' has no attribute {name!r}")
