"""What the planner says of what was measured: the table of ``xdit bench --predict``."""

import argparse
import statistics
from dataclasses import replace
from typing import Any

from torch import nn

from xfuser.bench.cases import CASES, seeded
from xfuser.bench.configurations import Configuration
from xfuser.config import EngineConfig, InputConfig, ParallelConfig
from xfuser.planner.estimate import Estimate, counted, estimate
from xfuser.planner.machines import Machine, calibrated
from xfuser.planner.rehearsal import Source, alone_of, rehearse


class CaseSource(Source):
    """The pipeline of a case, and its call."""

    def __init__(self, name: str, call: dict[str, Any]) -> None:
        super().__init__("", next(seeded(CASES[name].pipeline).transformer.parameters()).dtype)
        self._case, self._arguments = CASES[name], call
        self._pipe: Any = None

    def _built(self) -> dict[str, nn.Module]:
        self._pipe = seeded(self._case.pipeline)
        parts = {name: part for name, part in self._pipe.components.items() if isinstance(part, nn.Module)}
        return {name: self._faked(part) for name, part in parts.items()}

    def module(self, name: str) -> nn.Module:
        """The case's component, with its seeded weights."""
        return getattr(seeded(self._case.pipeline), name)

    def pipeline(self, parts: dict[str, nn.Module]) -> Any:
        """The case's pipeline, with these components in place of its own."""
        pipe = type(self._pipe)(**self._pipe.components | parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self, pipe: Any, wrapped: Any, inputs: InputConfig) -> dict[str, Any]:
        """The arguments of the case's call, with as many steps as are asked for."""
        return self._arguments | {"num_inference_steps": inputs.num_inference_steps}


def machine_here() -> Machine:
    """The calibrated machine that this is.

    Raises:
        ValueError: it was not calibrated.
    """
    machine = calibrated()
    if machine is None:
        raise ValueError("predict needs this machine's constants: run xdit plan --calibrate")
    return machine


def predicted(source: Source, engine: EngineConfig, inputs: InputConfig, machine: Machine, steps: int) -> Estimate:
    """Of a call with so many steps."""
    parallel, runtime = engine.parallel_config, replace(engine.runtime_config, use_torch_compile=False)
    warmup = runtime.warmup_steps if parallel.pipelined or parallel.patched else 0
    shown = replace(inputs, num_inference_steps=warmup + 2)
    with alone_of(engine.world_size):
        told = rehearse(replace(engine, runtime_config=runtime), shown, source)
    compiled = engine.runtime_config.use_torch_compile
    return estimate(counted(told, compiled), machine, steps, warmup, compiled)


def prediction_table(
    options: argparse.Namespace,
    inputs: InputConfig,
    base: EngineConfig,
    chosen: list[Configuration],
    told: list[dict[str, Any]],
) -> str:
    """Markdown: seconds of a call, measured and predicted, of each configuration and of one rank."""
    machine = machine_here()
    sizes = {name: getattr(options, name) for name in ("height", "width") if getattr(options, name) is not None}
    source = (
        CaseSource(options.case, CASES[options.case].call() | sizes)
        if options.case
        else Source(base.model_config.model, base.runtime_config.dtype)
    )
    engines = {one.name: one.engine for one in chosen}
    lines = ["| configuration | measured | predicted | error | where it goes |", "|---|---|---|---|---|"]
    for run in told:
        steps = run["serial"]["steps"][0]
        alone = replace(base, parallel_config=ParallelConfig())
        rows = [("serial", alone, run["serial"]["seconds"])]
        rows += [(row["name"], engines[row["name"]], row["seconds"]) for row in run["rows"] if row["name"] in engines]
        for name, engine, seconds in rows:
            if seconds:
                lines.append(_line(name, statistics.median(seconds), predicted(source, engine, inputs, machine, steps)))
    return "## Predicted\n\n" + "\n".join(lines)


def _line(name: str, measured: float, told: Estimate) -> str:
    parts = ", ".join(f"{part} {seconds:.2g}" for part, seconds in told.spent.most_common() if seconds > 0)
    error = 100 * (told.seconds / measured - 1)
    return f"| `{name}` | {measured:.3g} s | {told.seconds:.3g} s | {error:+.0f} % | {parts} |"
