"""``xdit bench --compile``: the gains of compiled blocks, of a configuration, and of both together.

A round has four calls: serial on rank 0 only and under the configuration, each without and with compiled blocks.
"""

import os
import statistics
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch._dynamo.utils import counters

from xfuser.bench.configurations import Configuration
from xfuser.bench.files import write_json, write_text
from xfuser.bench.measure import errors, of_all_ranks, say
from xfuser.bench.report import describe, describe_machine
from xfuser.bench.workload import Workload, timed, wrapped
from xfuser.core.distributed import get_world_group
from xfuser.models.plan import blocks_of
from xfuser.models.registry import planned_models


def measure(workload: Workload, chosen: list[Configuration], rounds: int) -> dict[str, Any]:
    """Measure on these ranks; returns the same results on each of them."""
    expected = workload.run(workload.pipe())
    serial = workload.load()
    for model, plan in planned_models(serial).values():
        for block in blocks_of(model, plan):
            block.module.compile()
    say("compiling the serial pipeline")
    told = {"ranks": dist.get_world_size(), "serial": _first_call(lambda: _alone(workload, serial)), "rows": []}
    for configuration in chosen:
        say(f"compiling {configuration.name}")
        told["rows"].append(_row(workload, configuration, serial, expected, rounds))
    return told


def _alone(workload: Workload, pipe: Any) -> torch.Tensor | None:
    return workload.run(pipe) if get_world_group().is_first_rank else None


def _row(
    workload: Workload, configuration: Configuration, serial: Any, expected: torch.Tensor, rounds: int
) -> dict[str, Any]:
    engine = configuration.engine
    compiling = replace(engine, runtime_config=replace(engine.runtime_config, use_torch_compile=True))
    pictures: list[torch.Tensor] = []
    with ExitStack() as stack:
        try:
            pipe = stack.enter_context(wrapped(workload.load(engine), compiling))
        except ValueError as error:  # raised when wrapping, on all ranks alike
            return {"name": configuration.name, "refused": str(error)}
        row = {"name": configuration.name} | _first_call(lambda: pictures.append(workload.run(pipe)))
        calls: dict[str, list[float]] = {"serial": [], "serial compiled": [], "eager": [], "compiled": []}
        for _ in range(rounds):
            calls["serial"].append(_seconds(lambda: _alone(workload, workload.pipe())))
            calls["serial compiled"].append(_seconds(lambda: _alone(workload, serial)))
            with wrapped(workload.pipe(engine), engine) as eager:
                calls["eager"].append(_seconds(lambda: workload.run(eager)))
            calls["compiled"].append(_seconds(lambda: workload.run(pipe)))
        told = of_all_ranks({"graphs": _graphs(), "error": errors(pictures[0], expected)["relative_error"]})
    return row | {"calls": calls, "later": max(told["graphs"]) - row["graphs"], "error": max(told["error"])}


def _first_call(call: Callable[[], Any]) -> dict[str, Any]:
    """Seconds of a call that compiles, and the maximum number of graphs and graph breaks over the ranks."""
    counters.clear()
    cold = _seconds(call)
    told = of_all_ranks({"graphs": _graphs(), "breaks": sum(counters["graph_break"].values())})
    return {"cold": cold} | {name: max(values) for name, values in told.items()}


def _graphs() -> int:
    return counters["stats"]["unique_graphs"]


def _seconds(call: Callable[[], Any]) -> float:
    start, end = timed(call)
    return end - start


def write_report(folder: str, title: str, options: dict[str, Any], told: list[dict[str, Any]]) -> str:
    """Write compiled.json and compiled.md; returns the Markdown."""
    machine = describe_machine()
    asked = {name: value for name, value in options.items() if value not in (None, "", False, [])}
    report = {"title": title, "machine": machine, "asked": asked, "runs": told}
    write_json(os.path.join(folder, "compiled.json"), report)
    text = "\n\n".join([f"# {title}, compiled", describe(machine), *map(table, told)]) + "\n"
    write_text(os.path.join(folder, "compiled.md"), text)
    return text


def table(run: dict[str, Any]) -> str:
    """A Markdown table for one number of ranks: median seconds, and speed-ups over the eager serial call."""
    serial = run["serial"]
    return "\n".join(
        [
            f"## {run['ranks']} ranks",
            "",
            f"The serial pipeline compiles {serial['graphs']} graphs with {serial['breaks']} breaks;"
            f" its first call takes {serial['cold']:.3g} s.",
            "",
            "| configuration | serial | serial compiled | eager | compiled | by compiling | by the method | by both"
            " | first call | graphs | breaks | later graphs | error |",
            "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
            *map(_line, run["rows"]),
        ]
    )


def _line(row: dict[str, Any]) -> str:
    if "refused" in row:
        return f"| `{row['name']}` | refused: {row['refused']} | | | | | | | | | | | |"
    median = [statistics.median(calls) for calls in row["calls"].values()]
    seconds = " | ".join(f"{one:.3g} s" for one in median)
    gains = " | ".join(f"{median[0] / one:.2f}" for one in median[1:2] + median[2:])
    return (
        f"| `{row['name']}` | {seconds} | {gains} | {row['cold']:.3g} s | {row['graphs']} | {row['breaks']}"
        f" | {row['later']} | {row['error']:.0e} |"
    )
