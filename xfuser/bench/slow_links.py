"""``xdit bench --slow_links``: compare configurations on two nodes, over links of several rates."""

import argparse
import json
import os
import signal
import statistics
import sys
import tempfile
from typing import Any

from xfuser.bench.command import check_outputs, chosen_configurations, title_of
from xfuser.bench.files import write_json, write_text
from xfuser.bench.nodes import bits_per_second, check_nodes, torchrun, two_nodes

RATES = ["100mbit", "1gbit", "10gbit"]


def main(options: argparse.Namespace, arguments: list[str]) -> int:
    """Run the command; returns the exit code."""
    chosen = chosen_configurations(options)
    rates = options.rates or RATES
    for rate in rates:
        bits_per_second(rate)
    worlds = {configuration.ranks for configuration in chosen}
    if len(worlds) > 1 or min(worlds) % 2:
        raise ValueError(f"slow_links: the configurations run on {sorted(worlds)} ranks; all must use one even number")
    check_nodes()
    check_outputs(options)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the nodes are removed
    told = {}
    for rate in rates:
        print(f"{rate}:", file=sys.stderr, flush=True)
        run = _measured(rate, options.delay, min(worlds), arguments)
        if run is None:
            return 1
        told[rate] = run
    print(_write_report(options, told))
    return 0


def _measured(rate: str, delay: str | None, ranks: int, arguments: list[str]) -> dict[str, Any] | None:
    """Run the bench on two nodes over this link; returns None if a node failed."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // ranks)))
    with tempfile.TemporaryDirectory() as folder, two_nodes(rate, delay) as nodes:
        part = os.path.join(folder, "part.json")
        command = ["-m", "xfuser.cli", "bench", *arguments, "--part", part]
        codes = [process.wait() for process in torchrun(nodes, ranks // 2, *command)]
        if any(codes):
            return None
        with open(part, encoding="utf-8") as file:
            return json.load(file)


def _write_report(options: argparse.Namespace, told: dict[str, Any]) -> str:
    from xfuser.bench.plots import draw_links
    from xfuser.bench.report import describe, describe_machine, summary

    machine = describe_machine()
    for run in told.values():
        for row in run["rows"]:
            if "refused" not in row:
                row["summary"] = summary(row, run)
    path = os.path.join(options.output_dir, "slow_links")
    title = f"{title_of(options)}, {next(iter(told.values()))['ranks']} ranks on two nodes"
    write_json(f"{path}.json", {"title": title, "machine": machine, "delay": options.delay, "rates": told})
    text = "\n\n".join([f"# {title}", describe(machine), _table(told)]) + "\n"
    write_text(f"{path}.md", text)
    draw_links(f"{path}.png", title, {bits_per_second(rate): run for rate, run in told.items()})
    return text


def _table(told: dict[str, Any]) -> str:
    """Seconds of a call and speed-up over serial, by configuration and rate."""
    runs = list(told.values())
    lines = [f"| configuration | sent a step | {' | '.join(told)} |", "|---" * (len(told) + 2) + "|"]
    serial = [f"{statistics.median(run['serial']['seconds']):.3g} s" for run in runs]
    lines.append(f"| serial | | {' | '.join(serial)} |")
    for place, row in enumerate(runs[0]["rows"]):
        if "refused" not in row:
            cells = [run["rows"][place]["summary"] for run in runs]
            shown = [f"{one['seconds']:.3g} s ({one['speed_up']:.2f})" for one in cells]
            lines.append(f"| `{row['name']}` | {row['summary']['sent'] / 1e6:.3g} MB | {' | '.join(shown)} |")
    return "\n".join(lines)
