"""Parallel forwards of a transformer that is in no pipeline, in a loop of the caller's own."""

from typing import Any

from torch import nn

from xfuser.config import EngineConfig
from xfuser.models.plan import ModelPlan
from xfuser.models.registry import register_plan
from xfuser.parallel import xDiTParallel


class Loop:
    """What stands where a pipeline would: a transformer, and the scheduler of the caller's loop, if it has one."""

    def __init__(self, transformer: nn.Module, scheduler: Any) -> None:
        self.transformer, self.scheduler = transformer, scheduler

    @property
    def components(self) -> dict[str, Any]:
        return {"transformer": self.transformer, "scheduler": self.scheduler}


def parallelize(
    transformer: nn.Module, plan: ModelPlan | None, engine_config: EngineConfig, scheduler: Any = None
) -> xDiTParallel:
    """Make a transformer's forward parallel within ``with parallelize(...).active():``, and nowhere else.

    Args:
        transformer: any module built of blocks that a plan can describe; the same weights on every rank.
        plan: is registered for its class; None for a class that has one.
        engine_config: from ``xFuserArgs.create_config()``.
        scheduler: of Diffusers' kind. PipeFusion, DistriFusion and guidance in two calls a step learn from it where a
            step ends. Within ``active()``, take it from what this returns: ``parallel.scheduler``.

    Raises:
        ValueError: there is no plan, or the degrees do not fit it or the number of ranks.
    """
    if plan is not None:
        register_plan(type(transformer), plan)
    parallel = engine_config.parallel_config
    if scheduler is None and (parallel.pipelined or parallel.patched):
        raise ValueError(
            "PipeFusion, DistriFusion and naive patches go by the scheduler's steps: give parallelize() the scheduler"
        )
    return xDiTParallel(Loop(transformer, scheduler), engine_config)
