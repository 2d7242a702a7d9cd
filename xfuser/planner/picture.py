"""Plots of plans (requires matplotlib, an optional package)."""

import os
from typing import Any

from xfuser.core.extras import extra
from xfuser.pipeline_io.media import write_whole
from xfuser.planner.cost import PARTS
from xfuser.planner.report import name_of
from xfuser.planner.table import Row


def _pyplot() -> Any:
    extra("matplotlib", "a plot").use("Agg")
    return extra("matplotlib.pyplot", "a plot")


def _save(figure: Any, path: str) -> str:
    os.makedirs(os.path.dirname(os.path.abspath(path)), exist_ok=True)
    return write_whole(path, lambda unfinished: figure.savefig(unfinished, dpi=110, bbox_inches="tight", format="png"))


def draw_plan(path: str, title: str, rows: list[Row]) -> str:
    """Plot a stacked bar for each configuration, with its seconds by part; returns the path."""
    figure, panel = _pyplot().subplots(figsize=(11, 1.5 + 0.4 * len(rows)))
    start = [0.0] * len(rows)
    for part in PARTS:
        seconds = [row.time.spent[part] for row in rows]
        if any(seconds):
            panel.barh(range(len(rows)), seconds, left=start, label=part)
            start = [a + b for a, b in zip(start, seconds, strict=True)]
    panel.set_yticks(range(len(rows)), [name_of(row) + " (stale)" * (not row.exact) for row in rows], fontsize=8)
    panel.invert_yaxis()
    panel.set_xlabel("seconds of a call")
    panel.set_title(title, fontsize=10)
    panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    path = _save(figure, path)
    _pyplot().close(figure)
    return path


def draw_scale(path: str, title: str, best: dict[int, Row]) -> str:
    """Plot time, efficiency, and cost of the best configuration over the number of ranks; returns the path."""
    figure, panels = _pyplot().subplots(1, 3, figsize=(15, 4.5))
    ranks = sorted(best)
    seconds = [best[count].seconds for count in ranks]
    first = seconds[0] * ranks[0]
    curves = {
        "seconds of a call": seconds,
        "efficiency": [first / (count * time) for count, time in zip(ranks, seconds, strict=True)],
        "cost: device-seconds of a call": [count * time for count, time in zip(ranks, seconds, strict=True)],
    }
    for panel, (name, values) in zip(panels, curves.items(), strict=True):
        panel.plot(ranks, values, marker="o")
        panel.set_xscale("log", base=2)
        panel.set_xticks(ranks, [str(count) for count in ranks])
        panel.set(title=name, xlabel="ranks", ylim=(0, None))
        panel.grid(alpha=0.3)
    figure.suptitle(title, fontsize=10)
    path = _save(figure, path)
    _pyplot().close(figure)
    return path
