"""The planner's predictions beside the measurements: the table of ``xdit bench --predict``."""

import argparse
import os
import statistics
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from xfuser.bench.cases import CASES, seeded
from xfuser.bench.command import base_arguments, check_outputs, chosen_configurations, compare, title_of
from xfuser.bench.configurations import PRESETS, Configuration
from xfuser.config import EngineConfig, InputConfig, ParallelConfig
from xfuser.planner.estimate import Estimate, counted, estimate
from xfuser.planner.machines import Machine, calibrated
from xfuser.planner.rehearsal import Source, alone_of, rehearse

MODELS = ("costs", "guided-joint", "joint", "video")  # cases of PixArt, Stable Diffusion 3, Flux, and Wan
BAR = 0.2  # maximum relative error to aim for


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
        """The case's pipeline, with these components instead of its own."""
        pipe = type(self._pipe)(**self._pipe.components | parts)
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call(self, pipe: Any, wrapped: Any, inputs: InputConfig) -> dict[str, Any]:
        """The arguments of the case's call, with the requested number of steps."""
        return self._arguments | {"num_inference_steps": inputs.num_inference_steps}


def machine_here() -> Machine:
    """This machine, as calibrated.

    Raises:
        ValueError: this machine was not calibrated.
    """
    machine = calibrated()
    if machine is None:
        raise ValueError("predict requires this machine's constants: run xdit plan --calibrate")
    return machine


def predicted(source: Source, engine: EngineConfig, inputs: InputConfig, machine: Machine, steps: int) -> Estimate:
    """Estimate a call with this many steps."""
    parallel, runtime = engine.parallel_config, replace(engine.runtime_config, use_torch_compile=False)
    warmup = runtime.warmup_steps if parallel.pipelined or parallel.patched else 0
    shown = replace(inputs, num_inference_steps=warmup + 2)
    with alone_of(engine.world_size):
        told = rehearse(replace(engine, runtime_config=runtime), shown, source)
    compiled = engine.runtime_config.use_torch_compile
    return estimate(counted(told, compiled, machine.norms), machine, steps, warmup, compiled)


@dataclass(frozen=True)
class Prediction:
    """The measured seconds of a call of a configuration, and the planner's estimate."""

    title: str
    name: str
    measured: float
    told: Estimate
    is_exact: bool

    @property
    def error(self) -> float:
        """The error of the prediction, relative to the measurement."""
        return self.told.seconds / self.measured - 1


def predictions(
    options: argparse.Namespace, chosen: list[Configuration], told: list[dict[str, Any]]
) -> list[Prediction]:
    """Predictions for one rank, and for each configuration that was measured."""
    machine, (base, inputs) = machine_here(), base_arguments(options).checked()
    sizes = {name: getattr(options, name) for name in ("height", "width") if getattr(options, name) is not None}
    source = (
        CaseSource(options.case, CASES[options.case].call() | sizes)
        if options.case
        else Source(base.model_config.model, base.runtime_config.dtype)
    )
    engines = {one.name: one.engine for one in chosen}
    found = []
    for run in told:
        steps = run["serial"]["steps"][0]
        rows = [("serial", replace(base, parallel_config=ParallelConfig()), run["serial"]["seconds"])]
        rows += [(row["name"], engines[row["name"]], row["seconds"]) for row in run["rows"] if row["name"] in engines]
        for name, engine, seconds in rows:
            if seconds:
                estimated = predicted(source, engine, inputs, machine, steps)
                measured = statistics.median(seconds)
                is_exact = not (engine.parallel_config.pipelined or engine.parallel_config.patched)
                found.append(Prediction(title_of(options), name, measured, estimated, is_exact))
    return found


def prediction_table(found: list[Prediction]) -> str:
    """Markdown table, in which the best measured and the recommended (named) exact configurations are marked."""
    lines = ["## Predicted", ""]
    for title in dict.fromkeys(one.title for one in found):
        rows = [one for one in found if one.title == title]
        exact = [one for one in rows if one.is_exact]
        best = min(exact, key=lambda one: one.measured)
        named = min(exact, key=lambda one: one.told.seconds)
        lines += [f"| {title} | measured | predicted | error | | where it goes |", "|---|---|---|---|---|---|"]
        words = {best.name: "best", named.name: "named"} if best is not named else {best.name: "best, named"}
        lines += [_line(one, words.get(one.name, "")) for one in rows]
        lines += ["", f"`{named.name}` is named, and costs {100 * (named.measured / best.measured - 1):.0f} %.", ""]
    errors = sorted(abs(one.error) for one in found)
    within = sum(error <= BAR for error in errors)
    lines.append(
        f"Median error {100 * statistics.median(errors):.0f} %, at most {100 * errors[-1]:.0f} %;"
        f" {within} of {len(errors)} within {100 * BAR:.0f} %."
    )
    return "\n".join(lines)


def _line(one: Prediction, word: str) -> str:
    parts = ", ".join(f"{part} {seconds:.2g}" for part, seconds in one.told.spent.most_common() if seconds > 0)
    times = f"{one.measured:.3g} s | {one.told.seconds:.3g} s | {100 * one.error:+.0f} %"
    return f"| `{one.name}` | {times} | {word} | {parts} |"


def run_cases(options: argparse.Namespace, arguments: list[str]) -> int:
    """Calibrate and measure, one model at a time; returns the exit code."""
    from xfuser.cli.main import launch

    found: list[Prediction] = []
    for case in MODELS:
        one = argparse.Namespace(**vars(options) | {"case": case, "output_dir": os.path.join(options.output_dir, case)})
        one.configs = options.configs or list(PRESETS)
        chosen = chosen_configurations(one)
        check_outputs(one)
        flags = ["--case", case, "--output_dir", one.output_dir, "--configs", *one.configs]
        if launch(max(one.ranks), ["plan", "--calibrate"]):
            return 1
        told = compare(one, [*arguments, *flags], chosen)
        if told is None:
            return 1
        found += predictions(one, chosen, told)
    print(prediction_table(found))
    return 0
