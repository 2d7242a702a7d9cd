"""Plots of measurements (require matplotlib, an optional package)."""

import statistics
import textwrap
from typing import Any

from xfuser.bench.files import write_file
from xfuser.core.extras import extra

PARTS = ("parameters", "buffers", "activations")


def pyplot() -> Any:
    """matplotlib's pyplot, with a backend for files."""
    extra("matplotlib", "a plot").use("Agg")
    return extra("matplotlib.pyplot", "a plot")


def save(figure: Any, path: str) -> str:
    """Write a figure to an image file and close it; returns the file's path."""
    written = write_file(path, lambda unfinished: figure.savefig(unfinished, dpi=110, bbox_inches="tight"))
    pyplot().close(figure)
    return written


def draw_report(path: str, title: str, told: list[dict[str, Any]]) -> str:
    """Plot call time, efficiency, bytes sent per step, and memory, with a bar for each configuration."""
    rows = [(run, row) for run in told for row in run["rows"] if "summary" in row]
    if not rows:
        raise ValueError("nothing was measured: every configuration was refused")
    names = [_label(row["name"], run["ranks"] if len(told) > 1 else None) for run, row in rows]
    lines = len(rows) * max(2, *(1 + name.count("\n") for name in names))
    figure, panels = pyplot().subplots(2, 2, figsize=(13, 1.8 + 0.34 * lines), sharey=True, squeeze=False)
    figure.suptitle(title)
    summaries = [row["summary"] for _, row in rows]
    _draw_times(panels[0][0], told, rows)
    _draw_gains(panels[0][1], summaries)
    _draw_traffic(panels[1][0], [row for _, row in rows])
    _draw_memory(panels[1][1], told, summaries)
    for panel in panels.flat:
        panel.set_yticks(range(len(rows)), names, fontsize=8)
        panel.grid(axis="x", alpha=0.3)
        panel.set_axisbelow(True)
        panel.set_xlim(0, 1.35 * panel.get_xlim()[1])  # room for the legend
        panel.legend(fontsize=8, loc="upper right")
    panels[0][0].invert_yaxis()
    figure.tight_layout()
    return save(figure, path)


def _label(name: str, ranks: int | None) -> str:
    return name.replace(" ", "\n") + (f" ({ranks} ranks)" if ranks else "")


def _draw_times(panel: Any, told: list[dict[str, Any]], rows: list[Any]) -> None:
    for place, (_, row) in enumerate(rows):
        one = row["summary"]
        spread = [[one["seconds"] - one["fastest"]], [one["slowest"] - one["seconds"]]]
        panel.barh(place, one["seconds"], xerr=spread, color="#4e79a7", ecolor="black", capsize=3)
    for run in told:
        places = [place for place, (own, _) in enumerate(rows) if own is run]
        serial = statistics.median(run["serial"]["seconds"])
        ends = [places[0] - 0.5, places[-1] + 0.5] if places else []
        panel.plot([serial] * len(ends), ends, color="#e15759", label="serial" if run is told[0] else None)
    panel.set_title("seconds of a call: median, fastest, slowest", fontsize=10)


def _draw_gains(panel: Any, summaries: list[dict[str, float]]) -> None:
    places = range(len(summaries))
    panel.barh([place - 0.2 for place in places], [one["speed_up"] for one in summaries], 0.38, label="speed-up")
    panel.barh([place + 0.2 for place in places], [one["efficiency"] for one in summaries], 0.38, label="efficiency")
    panel.axvline(1, color="black", linewidth=0.8)
    panel.set_title("speed-up over serial, efficiency", fontsize=10)


def _draw_traffic(panel: Any, rows: list[dict[str, Any]]) -> None:
    most = [max(row["sent"], key=lambda sent: sum(sent.values())) for row in rows]
    start = [0.0] * len(rows)
    for operation in sorted({name for sent in most for name in sent}):
        sizes = [sent.get(operation, 0) / 1e6 for sent in most]
        panel.barh(range(len(rows)), sizes, left=start, label=operation)
        start = [a + b for a, b in zip(start, sizes, strict=True)]
    panel.set_title("MB sent a step, by the rank that sends most", fontsize=10)


def _draw_memory(panel: Any, told: list[dict[str, Any]], summaries: list[dict[str, float]]) -> None:
    start = [0.0] * len(summaries)
    for key in PARTS:
        sizes = [one[key] / 1e6 for one in summaries]
        panel.barh(range(len(summaries)), sizes, left=start, label=key)
        start = [a + b for a, b in zip(start, sizes, strict=True)]
    serial = told[0]["serial"]
    panel.axvline((serial["parameters"][0] + serial["live"][0]) / 1e6, color="#e15759", label="serial")
    panel.set_title("MB at the peak, on the rank that holds most", fontsize=10)


def draw_timeline(path: str, told: list[dict[str, Any]], steps: int = 4) -> str:
    """Plot the first steps of the first run with PipeFusion: a row for each stage, a colour for each patch."""
    spans = next((row["spans"] for run in told for row in run["rows"] if row.get("spans")), None)
    if not spans:
        raise ValueError("timeline: no configuration has several PipeFusion stages")
    shown = [span for span in spans if span["step"] < steps]
    begin = min(span["start"] for span in shown)
    stages = 1 + max(span["stage"] for span in shown)
    figure, panel = pyplot().subplots(figsize=(11, 0.8 + 0.6 * stages))
    colours = pyplot().get_cmap("tab10").colors
    for span in shown:
        colour = "#aaaaaa" if span["step"] == 0 else colours[span["patch"] % 10]
        left, width = span["start"] - begin, span["end"] - span["start"]
        panel.barh(span["stage"], width, left=left, color=colour, edgecolor="white")
        label = f"{span['step']}.{span['patch']}" if span["step"] else "0"
        panel.text(left + width / 2, span["stage"], label, ha="center", va="center", color="white", fontsize=7)
    panel.set_yticks(range(stages), [f"stage {stage}" for stage in range(stages)])
    panel.invert_yaxis()
    panel.set_xlabel("seconds")
    return save(figure, path)


def draw_links(path: str, title: str, told: dict[float, dict[str, Any]]) -> str:
    """Plot the speed-up over serial by link rate (bits per second), with a line for each configuration."""
    figure, panel = pyplot().subplots(figsize=(8, 5))
    rates = sorted(told)
    names = [row["name"] for row in told[rates[0]]["rows"] if "summary" in row]
    for place, name in enumerate(names):
        rows = [next(row for row in told[rate]["rows"] if row["name"] == name) for rate in rates]
        gains = [row["summary"]["speed_up"] for row in rows]
        panel.plot([rate / 1e6 for rate in rates], gains, marker="os^Dvp*"[place % 7], label=name)
    panel.axhline(1, color="black", linewidth=0.8)
    panel.set_xscale("log")
    panel.set_xticks([rate / 1e6 for rate in rates], [f"{rate / 1e6:,.0f}" for rate in rates])
    panel.set_xlabel("Mbit/s between the nodes")
    panel.set_ylabel("speed-up over serial")
    panel.set_title(title, fontsize=11)
    panel.grid(alpha=0.3)
    panel.legend(fontsize=8, loc="upper left", bbox_to_anchor=(1.01, 1))
    return save(figure, path)


def draw_pictures(path: str, prompts: list[str], rows: dict[str, dict[str, Any]], columns: int = 6) -> str:
    """Show images side by side: a row for each configuration, a column for each of the first prompts."""
    from PIL import Image

    shown = min(columns, len(prompts))
    figure, panels = pyplot().subplots(len(rows), shown, figsize=(2.1 * shown, 2.3 * len(rows)), squeeze=False)
    for line, (name, row) in zip(panels, rows.items(), strict=True):
        for place, panel in enumerate(line):
            with Image.open(row["paths"][place]) as picture:
                panel.imshow(picture.convert("RGB"))
            panel.set(xticks=[], yticks=[])
            title = textwrap.fill(prompts[place], 24) if name == "serial" else f"{row['psnr'][place]:.1f} dB"
            panel.set_title(title, fontsize=8)
        line[0].set_ylabel(name.replace(" ", "\n"), fontsize=8)
    figure.tight_layout()
    return save(figure, path)
