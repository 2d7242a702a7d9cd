"""Plans for more ranks than one machine has: the combinations to count, and the best for each number of ranks."""

import math
from dataclasses import replace

from xfuser.config import xFuserArgs
from xfuser.config.config import legal_degrees
from xfuser.planner.machines import Machine
from xfuser.planner.report import ranked
from xfuser.planner.table import Row, located, plan, source_of

FEW = 16  # maximum number of ranks for which all combinations are counted
MOST = {"cfg": 2, "ulysses": 32, "ring": 32, "pipefusion": 1, "tensor": 1, "dp": 1}  # maximum degrees for more ranks


def choices_of(ranks: int) -> list[dict[str, int]]:
    """The combinations to count: all for few ranks; only Ulysses and ring, with or without CFG, for many.

    Raises:
        ValueError: there are none, as for a prime number of ranks above 32.
    """
    legal = legal_degrees(ranks)
    if ranks <= FEW:
        return legal
    found = [one for one in legal if all(n <= MOST[method] for method, n in one.items())]
    if not found:
        raise ValueError(f"{ranks} ranks: Ulysses and ring, up to 32 each, and CFG do not multiply to this number")
    return found


def best_of(
    counts: list[int], args: xFuserArgs, machine: Machine, compiled: bool, memory: int | None, exact: bool
) -> dict[int, Row]:
    """Return the fastest row for each number of ranks.

    If a number is a multiple of the one before, only the best row of that one is counted, with one of its degrees
    multiplied: as ranks grow, the methods in use seldom change all at once. For many ranks, only exact configurations
    are counted.

    Raises:
        ValueError: no configuration fits one of the numbers, or a number is below 1.
    """
    if min(counts) < 1:
        raise ValueError(f"scale={min(counts)} must be 1 or more")
    args = located(args)
    source, best, before = source_of(args), {}, 0
    good: list[Row] = []
    for ranks in sorted(set(counts)):
        choices = choices_of(ranks)
        if before and ranks % before == 0:
            choices = widened(good, ranks) or choices
        good, rest = ranked(plan(args, ranks, machine, compiled, choices, source, exact), "latency", memory)
        if not good:
            raise ValueError(f"nothing fits {ranks} ranks: {rest[0][0].name}: {rest[0][1]}")
        best[ranks], before = good[0], ranks
    return best


def widened(rows: list[Row], ranks: int) -> list[dict[str, int]]:
    """The first row's degrees with one multiplied to this many ranks; for many ranks, only within :data:`MOST`."""
    most = MOST if ranks > FEW else dict.fromkeys(MOST, ranks) | {"cfg": 2}
    inside = (row.degrees for row in rows if all(n <= most[method] for method, n in row.degrees.items()))
    degrees = next(inside, {})
    factor = ranks // math.prod(degrees.values())
    return [{**degrees, method: n * factor} for method, n in degrees.items() if n * factor <= most[method]]


def with_groups(args: xFuserArgs, ranks: int, machine: Machine, compiled: bool, exact: bool) -> list[Row]:
    """Rows for groups of ranks that generate separate images at the same time: the rows of fewer ranks, repeated."""
    args = located(args)
    source, rows = source_of(args), []
    for size in (size for size in range(1, ranks) if ranks % size == 0):
        rows += [replace(row, groups=ranks // size) for row in plan(args, size, machine, compiled, None, source, exact)]
    return rows
