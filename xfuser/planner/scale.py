"""More ranks than one machine has: which combinations are looked at, and the best one for each number of ranks."""

import math
from dataclasses import replace

from xfuser.config import xFuserArgs
from xfuser.config.config import legal_degrees
from xfuser.planner.machines import Machine
from xfuser.planner.report import ranked
from xfuser.planner.table import Row, located, plan, source_of

FEW = 16  # ranks up to which all combinations are looked at
MOST = {"cfg": 2, "ulysses": 32, "ring": 32, "pipefusion": 1, "tensor": 1, "dp": 1}  # for more ranks


def choices_of(ranks: int) -> list[dict[str, int]]:
    """The combinations to look at: all of them for few ranks; for many Ulysses and rings, with guidance or not."""
    legal = legal_degrees(ranks)
    if ranks <= FEW:
        return legal
    return [one for one in legal if all(n <= MOST[method] for method, n in one.items())]


def best_of(
    counts: list[int], args: xFuserArgs, machine: Machine, compiled: bool, memory: int | None, exact: bool
) -> dict[int, Row]:
    """The fastest row of each number of ranks.

    Where it is a multiple of the number before, the best of that one is looked at with one of its degrees multiplied:
    as ranks grow, the methods that are in use seldom change all at once. Of many ranks, what is looked at is exact.

    Raises:
        ValueError: no configuration fits one of them, or a number is below 1.
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
    """What so many ranks are with one degree of the first row multiplied, for many of one within :data:`MOST`."""
    most = MOST if ranks > FEW else dict.fromkeys(MOST, ranks) | {"cfg": 2}
    inside = (row.degrees for row in rows if all(n <= most[method] for method, n in row.degrees.items()))
    degrees = next(inside, {})
    factor = ranks // math.prod(degrees.values())
    return [{**degrees, method: n * factor} for method, n in degrees.items() if n * factor <= most[method]]


def with_groups(args: xFuserArgs, ranks: int, machine: Machine, compiled: bool, exact: bool) -> list[Row]:
    """Groups of ranks that draw images of their own side by side: the rows of fewer ranks, several times."""
    args = located(args)
    source, rows = source_of(args), []
    for size in (size for size in range(1, ranks) if ranks % size == 0):
        rows += [replace(row, groups=ranks // size) for row in plan(args, size, machine, compiled, None, source, exact)]
    return rows
