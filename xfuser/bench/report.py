"""Write measurements as a report: bench.json, bench.md, and bench.png in one folder."""

import os
import platform
import statistics
from importlib.metadata import version
from typing import Any

import torch

from xfuser.bench.costs import cost_table
from xfuser.bench.files import write_json, write_text
from xfuser.core import device as devices


def write_report(folder: str, title: str, options: dict[str, Any], told: list[dict[str, Any]]) -> str:
    """Write the report of runs (``xfuser.bench.measure``), one per number of ranks; returns its Markdown."""
    from xfuser.bench.plots import draw_report, draw_timeline

    machine = describe_machine()
    for run in told:
        for row in run["rows"]:
            if "refused" not in row:
                row["summary"] = summary(row, run)
    asked = {name: value for name, value in options.items() if value not in (None, "", False, [])}
    write_json(os.path.join(folder, "bench.json"), {"title": title, "machine": machine, "asked": asked, "runs": told})
    text = "\n\n".join([f"# {title}", describe(machine), *map(table, told), *cost_table(told)]) + "\n"
    write_text(os.path.join(folder, "bench.md"), text)
    draw_report(os.path.join(folder, "bench.png"), title, told)
    if options.get("timeline"):
        draw_timeline(options["timeline"], told)
    return text


def describe_machine() -> dict[str, Any]:
    """The machine and the versions of the main packages."""
    return {
        "device": devices.device_name(),
        "cores": os.cpu_count(),
        "system": platform.platform(),
        "torch": torch.__version__,
        "diffusers": version("diffusers"),
        "threads": os.environ.get("OMP_NUM_THREADS", str(torch.get_num_threads())),
    }


def describe(machine: dict[str, Any]) -> str:
    """One sentence about the machine and the versions of a report."""
    return (
        f"{machine['device']}, {machine['cores']} cores, {machine['threads']} threads a rank, torch {machine['torch']},"
        f" diffusers {machine['diffusers']}, {machine['system']}."
    )


def summary(row: dict[str, Any], run: dict[str, Any]) -> dict[str, float]:
    """The figures of the table: maxima over the ranks, the minimum of PSNR, and the mean of waiting.

    Seconds are per call. The speed-up is relative to a serial call on its own. The efficiency is relative to serial
    calls on all ranks at once, which share the machine as the ranks of the parallel call do.
    """
    seconds = statistics.median(row["seconds"])
    return {
        "seconds": seconds,
        "fastest": min(row["seconds"]),
        "slowest": max(row["seconds"]),
        "speed_up": statistics.median(run["serial"]["seconds"]) / seconds,
        "efficiency": statistics.median(run["serial"]["beside"]) / (run["ranks"] * seconds),
        "waiting": statistics.median(statistics.mean(shares) for shares in row["waiting"]),
        "sent": max(sum(sent.values()) for sent in row["sent"]),
        "parameters": max(row["parameters"]),
        "live": max(row["live"]),
        "buffers": max(row["buffers"]),
        "activations": max(live - kept for live, kept in zip(row["live"], row["buffers"], strict=True)),
        "max_error": max(row["max_error"]),
        "relative_error": max(row["relative_error"]),
        "psnr": min(row["psnr"]),
    }


def table(run: dict[str, Any]) -> str:
    """A Markdown table for one number of ranks."""
    serial = run["serial"]
    alone, beside = (statistics.median(serial[name]) for name in ("seconds", "beside"))
    spread = f"{min(serial['seconds']):.3g} to {max(serial['seconds']):.3g}"
    lines = [
        f"## {run['ranks']} rank{'s' * (run['ranks'] > 1)}",
        "",
        f"Serial call: {alone:.3g} s alone ({spread}), {beside:.3g} s"
        f" on all ranks at once; {serial['steps'][0]} steps, {len(serial['seconds'])} rounds.",
        "",
        "| configuration | call (spread) | speed-up | efficiency | waiting | sent a step | by operation | parameters"
        " | live tensors | buffers | error | PSNR |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|",
        f"| serial | {alone:.3g} s | 1 | | | | | {megabytes(serial['parameters'][0])}"
        f" | {megabytes(serial['live'][0])} | {megabytes(serial['buffers'][0])} | | |",
        *map(_line, run["rows"]),
        *(f"\n{line}" for row in run["rows"] if (line := _asynchronous(row, alone / serial["steps"][0]))),
    ]
    return "\n".join(lines)


def _line(row: dict[str, Any]) -> str:
    if "refused" in row:
        return f"| `{row['name']}` | refused: {row['refused']} | | | | | | | | | | |"
    one = row["summary"]
    most = max(row["sent"], key=lambda sent: sum(sent.values()))
    operations = ", ".join(f"{name} {megabytes(count)}" for name, count in sorted(most.items(), key=lambda x: -x[1]))
    return (
        f"| `{row['name']}` | {one['seconds']:.3g} s ({one['fastest']:.3g} to {one['slowest']:.3g})"
        f" | {one['speed_up']:.2f} | {one['efficiency']:.2f} | {one['waiting']:.0%} | {megabytes(one['sent'])}"
        f" | {operations} | {megabytes(one['parameters'])} | {megabytes(one['live'])} | {megabytes(one['buffers'])}"
        f" | {one['relative_error']:.0e} | {decibels(one['psnr'])} |"
    )


def _asynchronous(row: dict[str, Any], serial: float) -> str | None:
    """The speed of PipeFusion's asynchronous steps in the last round; ``serial``: seconds of a serial step."""
    spans = row.get("spans") or []
    patches: dict[int, set[int]] = {}
    for span in spans:
        patches.setdefault(span["step"], set()).add(span["patch"])
    steps = [step for step, seen in patches.items() if len(seen) > 1]
    if not steps:
        return None
    before = [span["end"] for span in spans if span["step"] < min(steps)] or [min(span["start"] for span in spans)]
    seconds = (max(span["end"] for span in spans) - max(before)) / len(steps)
    times = f"{serial / seconds:.2f} times as long"
    return f"`{row['name']}`: an asynchronous step takes {seconds:.3g} s, a serial one {times}."


def megabytes(count: float) -> str:
    """Format a number of bytes as MB, or as kB if it is small."""
    return f"{count / 1e6:.3g} MB" if count >= 1e5 else f"{count / 1e3:.3g} kB" if count else "0"


def decibels(psnr: float) -> str:
    """Format a peak signal-to-noise ratio; for equal images, it is above 119 dB."""
    return f"{psnr:.1f} dB" if psnr < 119 else "> 119 dB"
