"""``python -m xfuser.bench.fit_profiles FOLDER``: fit the planner's constants to published measurements.

There are eight constants per kind of links; both kinds share most of them. A ninth one, of copies from the host, serves
only points of software that copied in each step. For the tables, each machine is predicted
from its data sheet, with constants fitted to all other machines. No constant belongs to a machine, a model, or a
configuration. ``--write`` writes the constants fitted to all machines into the package.
"""

import argparse
import json
import math
import os
import pickle
import statistics
import sys
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import asdict
from typing import Any

import numpy as np

from xfuser.bench.points import Point, read
from xfuser.planner.estimate import Counted, Parts, counted, estimate
from xfuser.planner.machines import FILE, KINDS, Constants, machine_of, shipped
from xfuser.planner.rehearsal import Rehearsed, Source, alone_of, rehearse

BOUNDS = {  # lower bound, start, and upper bound of each fitted constant
    "matmul": (1e11, 4.5e11, 2e12), "attention": (0.3, 2.0, 6.0), "kernels": (0.4, 0.7, 1.0),
    "convolution": (0.1, 0.3, 1.0), "memory": (0.3, 0.7, 1.0), "nvlink": (0.05, 0.4, 1.0), "pcie": (0.05, 0.5, 1.0),
    "host": (1e-6, 3e-5, 2e-4), "start": (1e-6, 3e-5, 3e-4), "call": (0.01, 0.2, 1.0),
    "copy": (1e9, 6e9, 3e10),
}  # fmt: skip
UNSHIPPED = ("kernels", "copy")  # the first belongs to data sheets, the second to old software
LOW, START, HIGH = (np.log([values[i] for values in BOUNDS.values()]) for i in range(3))
SURE = 0.05  # a constant at this distance from its start (logarithm) weighs as much as a point with an error of ROBUST
ROBUST = 0.12  # larger errors weigh less


def main(arguments: list[str]) -> int:
    """Fit, print the tables, and write the constants if requested."""
    flags = argparse.ArgumentParser(prog="python -m xfuser.bench.fit_profiles", description=__doc__.splitlines()[0])
    flags.add_argument("folder", help="Folder of points.csv and points_from_images.csv.")
    flags.add_argument("--counts", help="File to cache the rehearsals in, for the next run.")
    flags.add_argument("--write", action="store_true", help="Write the fitted constants into the package.")
    options = flags.parse_args(arguments)
    points, left = read(options.folder)
    told = rehearsals(points, options.counts)
    model = Model(points, told)
    points = [point for point in points if point.counted in told]
    everywhere = model.fit(points, START)
    predicted: dict[str, float] = {}
    for machine in sorted({point.machine for point in points}):
        own = [point for point in points if point.machine == machine]
        others = model.fit([point for point in points if point.machine != machine], everywhere)
        predicted |= {point.id: model.seconds(point, others) for point in own}
        say(f"without {machine}: {_words(others)}")
    print("\n".join(report(points, predicted, left, everywhere)))
    if options.write:
        write(everywhere)
    return 0


def say(text: str) -> None:
    """Report progress to the user."""
    print(text, file=sys.stderr, flush=True)


def rehearsals(points: Iterable[Point], path: str | None) -> dict[Any, Rehearsed]:
    """The rehearsal of each configuration, by :attr:`Point.counted`."""
    told: dict[Any, Rehearsed] = {}
    if path and os.path.exists(path):
        with open(path, "rb") as file:
            told = pickle.load(file)
    source: Source | None = None
    for point in sorted({point.counted: point for point in points}.values(), key=lambda point: point.counted):
        if point.counted in told:
            continue
        if source is None or source.model != point.model:
            source = Source(point.model, point.arguments(1).checked(point.ranks)[0].runtime_config.dtype)
        engine, inputs = point.arguments(source.steps(point.degrees[3], 1)).checked(point.ranks)
        say(f"counting {point.model} {dict(point.size)} {point.name}")
        try:
            with alone_of(point.ranks):
                told[point.counted] = rehearse(engine, inputs, source)
        except ValueError as error:
            say(f"left out: {error}")
    if path:
        with open(path, "wb") as file:
            pickle.dump(told, file)
    return told


class Model:
    """Predicts points from constants, which are given as logarithms in the order of :data:`BOUNDS`."""

    def __init__(self, points: list[Point], told: dict[Any, Rehearsed]) -> None:
        self._programs: dict[Any, Counted] = {}
        parts: dict[Any, Parts] = {}  # the same for all degrees
        for point in points:
            key = point.counted, point.compiled, point.norms
            if key not in self._programs and point.counted in told:
                program = counted(told[point.counted], point.compiled, point.norms)
                program.parts = parts.setdefault((point.model, point.size, point.norms), program.parts)
                self._programs[key] = program

    def seconds(self, point: Point, constants: np.ndarray) -> float:
        """Predicted seconds of what the point's source measured: a step, all steps, or the call."""
        one = named(constants)
        machine = machine_of(
            point.machine, constants=constants_of(constants), kernels=one["kernels"], newest=point.newest
        )
        program = self._programs[point.counted, point.compiled, point.norms]
        told = estimate(program, machine, point.steps, 1, point.compiled)
        seconds = {"step": told.step, "denoise": told.denoise, "call": told.seconds}[point.scope]
        copies, size = point.copied  # the device waits until each is issued, and until it is done
        return seconds + (copies * one["host"] + size / one["copy"]) * (1 if point.scope == "step" else point.steps)

    def errors(self, points: list[Point], constants: np.ndarray) -> np.ndarray:
        """Logarithms of predicted over measured seconds, then the constants' scaled distances from their start."""
        known: dict[Any, float] = {}
        for point in sorted(points, key=lambda point: (point.machine, point.model, point.size, point.newest)):
            key = (*point.group[1:], point.degrees, point.newest, point.norms)
            if key not in known:
                known[key] = self.seconds(point, constants)
            known[point.id] = math.log(known[key] / point.seconds)
        own = (constants - START) / SURE * ROBUST
        return np.concatenate([[known[point.id] for point in points], own])

    def fit(self, points: list[Point], start: np.ndarray, rounds: int = 6) -> np.ndarray:
        """The constants with the smallest errors, of which those above ``ROBUST`` weigh less: damped Gauss-Newton."""
        now, found, damping = start, self.errors(points, start), 1e-2
        for _ in range(rounds):
            slopes = self.slopes(points, now)
            weights = 1 / np.sqrt(1 + (found / ROBUST) ** 2)
            matrix, side = slopes.T @ (weights[:, None] * slopes), slopes.T @ (weights * found)
            for _ in range(4):
                step = np.linalg.solve(matrix + damping * np.diag(np.diag(matrix)), side)
                after = np.clip(now - step, LOW, HIGH)
                errors = self.errors(points, after)
                gain = _loss(found) - _loss(errors)
                if gain > 0:
                    now, found, damping = after, errors, damping / 3
                    break
                damping *= 6
            if gain < 2e-3 * _loss(found):
                break
        return now

    def slopes(self, points: list[Point], constants: np.ndarray) -> np.ndarray:
        """The derivatives of the errors with respect to each constant."""
        found, width = self.errors(points, constants), 0.02
        return (
            np.stack([self.errors(points, constants + shift) - found for shift in width * np.eye(len(LOW))], 1) / width
        )


def _loss(errors: np.ndarray) -> float:
    return float(np.sum(np.sqrt(1 + (errors / ROBUST) ** 2) - 1))


def named(values: np.ndarray) -> dict[str, float]:
    """The constants by name."""
    return dict(zip(BOUNDS, map(float, np.exp(values)), strict=True))


def constants_of(values: np.ndarray) -> dict[str, Constants]:
    """The constants by kind of links."""
    one = named(values)
    shared = {name: value for name, value in one.items() if name not in (*KINDS, *UNSHIPPED)}
    return {kind: Constants(link=one[kind], **shared) for kind in ("nvlink", "pcie")}


def _words(values: np.ndarray) -> str:
    return ", ".join(f"{name} {value:.3g}" for name, value in named(values).items())


def write(values: np.ndarray) -> None:
    """Write the constants into the package."""
    kept = shipped()
    fitted = {kind: asdict(one) for kind, one in constants_of(values).items()}
    constants = kept["constants"] | {
        kind: {name: float(f"{value:.4g}") for name, value in one.items()} for kind, one in fitted.items()
    }
    kernels = {"kernels": float(f"{named(values)['kernels']:.3g}")}
    sheets = {name: sheet | (kernels if "kernels" in sheet else {}) for name, sheet in kept["machines"].items()}
    blocks = [
        f' "{title}": {{\n' + ",\n".join(f'  "{name}": {json.dumps(one)}' for name, one in part.items()) + "\n }"
        for title, part in (("constants", constants), ("machines", sheets))
    ]
    FILE.write_text("{\n" + ",\n".join(blocks) + "\n}\n", encoding="utf-8")


def report(points: list[Point], predicted: dict[str, float], left: Any, everywhere: np.ndarray) -> list[str]:
    """The tables as Markdown: the targets, each group (largest errors first), and the points left out."""
    errors = {point.id: predicted[point.id] / point.seconds - 1 for point in points}
    sizes = [abs(error) for error in errors.values()]
    groups: dict[Any, list[Point]] = defaultdict(list)
    for point in points:
        groups[point.group].append(point)
    choices = [choice for group in groups.values() if (choice := chosen(group, predicted))]
    same = [choice for group in groups.values() for choice in _of_same_ranks(group, predicted)]
    lines = [
        f"{len(points)} points of {len({point.machine for point in points})} machines, each without its own.",
        "",
        "| | asked | found |",
        "|---|---|---|",
        f"| median error | 12 % | {100 * statistics.median(sizes):.1f} % |",
        f"| within 30 % | 90 % | {100 * statistics.mean(size <= 0.3 for size in sizes):.0f} % |",
        *_choice_lines("3 configurations or more", choices),
        *_choice_lines("as above, of equal ranks, 2 or more", same),
        "",
        f"All machines together: {_words(everywhere)}.",
        "",
        "| machine | points | median error | within 30 % | mean |",
        "|---|---|---|---|---|",
    ]
    for machine in sorted({point.machine for point in points}):
        own = [errors[point.id] for point in points if point.machine == machine]
        within = statistics.mean(abs(error) <= 0.3 for error in own)
        lines.append(
            f"| {machine} | {len(own)} | {100 * statistics.median(map(abs, own)):.0f} % | {100 * within:.0f} %"
            f" | {100 * statistics.mean(own):+.0f} % |"
        )
    lines += ["", "| group | error of each configuration | best measured | named | costs |", "|---|---|---|---|---|"]
    order = sorted(groups.values(), key=lambda group: -statistics.median(abs(errors[point.id]) for point in group))
    lines += [_group_line(group, errors, chosen(group, predicted)) for group in order]
    lines += [
        "",
        "| left out | rows |",
        "|---|---|",
        *(f"| {reason} | {count} |" for reason, count in left.most_common()),
    ]
    return lines


def _choice_lines(title: str, choices: list[tuple[Point, Point, float]]) -> list[str]:
    if not choices:
        return []
    right = statistics.mean(cost <= 0 for _, _, cost in choices)
    return [
        f"| best named, {title} ({len(choices)} groups) | 80 % | {100 * right:.0f} % |",
        f"| what the named one costs (median) | 5 % | {100 * statistics.median(cost for *_, cost in choices):.1f} % |",
    ]


def chosen(group: list[Point], predicted: dict[str, float], least: int = 3) -> tuple[Point, Point, float] | None:
    """The best point, the recommended one, and its extra cost; None for groups with fewer configurations."""
    measured: dict[Any, list[Point]] = defaultdict(list)
    for point in group:
        measured[point.degrees].append(point)
    if len(measured) < least:
        return None
    times = {degrees: statistics.median(point.seconds for point in own) for degrees, own in measured.items()}
    best = min(times, key=lambda degrees: times[degrees])
    named = min(times, key=lambda degrees: predicted[measured[degrees][0].id])
    return measured[best][0], measured[named][0], times[named] / times[best] - 1


def _of_same_ranks(group: list[Point], predicted: dict[str, float]) -> list[tuple[Point, Point, float]]:
    counts = sorted({point.ranks for point in group})
    found = [chosen([point for point in group if point.ranks == count], predicted, 2) for count in counts]
    return [choice for choice in found if choice]


def _group_line(group: list[Point], errors: dict[str, float], choice: tuple[Point, Point, float] | None) -> str:
    one = group[0]
    size = "x".join(str(value) for _, value in one.size)
    parts = ", ".join(f"{point.name} {100 * errors[point.id]:+.0f} %" for point in sorted(group, key=lambda p: p.ranks))
    name = f"{one.machine} {one.model} {size} {'compiled' if one.compiled else 'eager'} ({one.source})"
    told = f"{choice[0].name} | {choice[1].name} | {100 * choice[2]:.0f} %" if choice else " | | "
    return f"| {name} | {parts} | {told} |"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
