"""More ranks than one machine has: which combinations are looked at, and the best one for each number of ranks."""

from dataclasses import replace

from xfuser.config import xFuserArgs
from xfuser.config.config import legal_degrees
from xfuser.planner.machines import Machine
from xfuser.planner.report import ranked
from xfuser.planner.table import Row, located, plan, source_of

FEW = 16  # ranks up to which all combinations are looked at
MOST = {"ulysses": 64, "ring": 16, "pipefusion": 8, "tensor": 8, "dp": 64}  # degrees beyond are not looked at


def choices_of(ranks: int) -> list[dict[str, int]]:
    """The combinations to look at: all of them for few ranks, for many those of two methods, with guidance or not."""
    legal = legal_degrees(ranks)
    if ranks <= FEW:
        return legal
    near = [one for one in legal if all(one.get(method, 1) <= most for method, most in MOST.items())]
    few = [one for one in near if sum(n > 1 for method, n in one.items() if method != "cfg") <= 2]
    return [one for one in few if one["tensor"] == one["dp"] == 1]


def best_of(
    counts: list[int], args: xFuserArgs, machine: Machine, compiled: bool, memory: int | None, exact: bool
) -> dict[int, Row]:
    """The fastest row of each number of ranks.

    Raises:
        ValueError: no configuration fits one of them.
    """
    args = located(args)
    source, best = source_of(args), {}
    for ranks in counts:
        good, rest = ranked(plan(args, ranks, machine, compiled, choices_of(ranks), source), "latency", memory, exact)
        if not good:
            raise ValueError(f"nothing fits {ranks} ranks: {rest[0][0].name}: {rest[0][1]}")
        best[ranks] = good[0]
    return best


def with_groups(args: xFuserArgs, ranks: int, machine: Machine, compiled: bool) -> list[Row]:
    """Groups of ranks that draw pictures of their own side by side: the rows of fewer ranks, several times."""
    args = located(args)
    source, rows = source_of(args), []
    for size in (size for size in range(1, ranks) if ranks % size == 0):
        rows += [replace(row, groups=ranks // size) for row in plan(args, size, machine, compiled, None, source)]
    return rows
