"""``xdit plan``: list the degrees of parallelism possible on a number of ranks, with their memory and time."""

import argparse
import os
from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from xfuser.config import FlexibleArgumentParser, xFuserArgs
from xfuser.config.args import in_bytes
from xfuser.config.config import DEGREES, check_known, in_words
from xfuser.core import device as devices
from xfuser.pipeline_io.media import check_writable
from xfuser.planner.machines import NODE, Machine, devices_of, in_bytes_a_second, machine_of
from xfuser.planner.published import named, published
from xfuser.planner.report import explain, left_out, name_of, ranked, table
from xfuser.planner.scale import best_of, choices_of, with_groups
from xfuser.planner.table import COLUMNS, OBJECTIVES, Row, plan

# Flags that need --gpus.
TIMED = ("links", "nodes", "node_link", "objective", "compile", "exact", "explain", "scale", "picture")


def main(arguments: list[str]) -> int:
    """Print memory and time of each legal combination of degrees; returns 1 if none fits into the memory."""
    flags = parser()
    options = flags.parse_args(arguments)
    check(options, [name for name, value in vars(options).items() if value != flags.get_default(name)])
    if options.calibrate:
        from xfuser.cli.calibrate import run

        return run(arguments)
    args = call_of(options, any("inference" in argument for argument in arguments))
    if options.gpus:
        return _with_times(options, args, *machines_of(options))
    if options.world_size is None:
        raise ValueError("give --gpus, such as 8xL40, or --world_size for memory only")
    if options.world_size < 1:
        raise ValueError(f"world_size={options.world_size} must be 1 or more")
    return _memory_alone(args, options.world_size)


def check(options: argparse.Namespace, given: list[str]) -> None:
    """Raise a ValueError for given flags that have no effect or exclude each other."""

    def refuse(names: Iterable[str], why: str) -> None:
        if found := [name for name in given if name in names]:
            raise ValueError(f"{found[0]}={getattr(options, found[0])!r} {why}")

    if options.calibrate:
        refuse({*given} - {"calibrate"}, "changes nothing about a calibration: remove it")
    check_known("objective", options.objective, OBJECTIVES)
    degrees = {names.flag for names in DEGREES.values()}
    refuse(
        degrees | {"auto", "allow_stale", "use_split_batch"},
        "chooses degrees, and xdit plan lists all of them: remove it",
    )
    if not options.gpus:
        refuse(TIMED, "requires --gpus: add it, such as --gpus 8xL40")
    else:
        refuse(("world_size",), "and gpus both give the number of ranks: remove one")
        if os.path.isdir(options.picture):
            raise ValueError(f"picture={options.picture!r} is a folder: give a file, such as plan.png")
        check_writable(os.path.dirname(options.picture))
    if options.scale:
        refuse(("explain", "objective"), "is not supported with --scale: remove one")
    elif options.nodes == 1:
        refuse(("node_link",), "requires several nodes: add --nodes, or --scale")


def call_of(options: argparse.Namespace, steps_given: bool) -> xFuserArgs:
    """The arguments of the planned run, with usual values for those that are not given."""
    args = xFuserArgs.from_cli_args(options)
    if (name := named(args.model)) and not steps_given:
        args = replace(args, num_inference_steps=published()[name]["call"]["steps"])
    if args.dtype == "auto" and options.gpus:
        args = replace(args, dtype="bfloat16")
    return args if any(args.prompt) else replace(args, prompt="a")


def machines_of(options: argparse.Namespace) -> tuple[int, Machine]:
    """The number of ranks on all nodes, and the machine."""
    count, name = devices_of(options.gpus)
    if options.nodes < 1:
        raise ValueError(f"nodes={options.nodes} must be 1 or more")
    rate = in_bytes_a_second(options.node_link) if options.node_link else None
    several = options.nodes > 1 or (options.scale and count > 1)  # nodes of this size
    node = count if several else max(NODE, count)
    return count * options.nodes, machine_of(name, options.links, node, rate)


def _memory_alone(args: xFuserArgs, world_size: int) -> int:
    rows = plan(args, world_size)
    memory = (in_bytes(args.memory) if args.memory else None) or devices.total_memory()
    width = max(len(row.name) for row in rows)
    print(f"GB of a rank, {args.dtype}, {world_size} ranks")
    print(f"{'':{width}}  " + "  ".join(COLUMNS))
    for row in sorted(rows, key=lambda row: row.peak):
        print(f"{row.name:{width}}  {row.text(memory)}")
    return 0 if any(row.fits(memory) and not row.refusal for row in rows) else 1


def _with_times(options: argparse.Namespace, args: xFuserArgs, ranks: int, machine: Machine) -> int:
    memory = in_bytes(args.memory) if args.memory else machine.memory
    compiled = options.compile or args.use_torch_compile
    args = replace(args, use_torch_compile=False)
    title = (
        f"{named(args.model) or args.model or 'the shipped pipeline'} on {machine.name}, {args.num_inference_steps}"
        f" steps, {args.dtype}, {'compiled' if compiled else 'eager'}"
    )
    if options.scale:
        return _scale(options, args, machine, memory, compiled, title)
    choices = choices_of(ranks)
    if options.explain and options.objective != "throughput":
        check_known("explain", options.explain, ["best", *map(in_words, choices)])
    rows = plan(args, ranks, machine, compiled, choices, exact=options.exact)
    if options.objective == "throughput":
        rows += with_groups(args, ranks, machine, compiled, options.exact)
    good, rest = ranked(rows, options.objective, memory)
    print(f"{ranks} ranks: {title}")
    if good:
        print("\n".join(table(good, options.objective)))
    print("\n".join(left_out(rest)))
    if options.explain:
        print("\n".join(explain(_chosen(options.explain, good), machine, args.num_inference_steps, compiled)))
    if good:
        _draw("draw_plan", options.picture, f"{ranks} ranks: {title}", good)
    return 0 if good else 1


def _draw(kind: str, path: str, *what: Any) -> None:
    """Draw the picture and print its path, or print the reason if that fails: the table shows the same."""
    from xfuser.planner import picture

    try:
        print(getattr(picture, kind)(path, *what))
    except ValueError as error:
        print(error)


def _chosen(name: str, rows: list[Row]) -> Row:
    if name == "best" and rows:
        return rows[0]
    check_known("explain", name, ["best", *map(name_of, rows)])
    return next(row for row in rows if name_of(row) == name)


def _scale(
    options: argparse.Namespace, args: xFuserArgs, machine: Machine, memory: int | None, compiled: bool, title: str
) -> int:
    best = best_of(options.scale, args, machine, compiled, memory, options.exact)
    print(f"{title}\n   ranks   seconds  efficiency  device-seconds  configuration")
    first = min(best)
    for count, row in sorted(best.items()):
        efficiency = first * best[first].seconds / (count * row.seconds)
        print(f"{count:8}  {row.seconds:8.3g}  {efficiency:10.2f}  {count * row.seconds:14.4g}  {row.name}")
    _draw("draw_scale", options.picture, title, best)
    return 0


def parser() -> FlexibleArgumentParser:
    """The flags of ``xdit plan``: those of ``xdit``, the machine, and the output."""
    flags = FlexibleArgumentParser(
        prog="xdit plan",
        description="List the legal combinations of degrees of parallelism with the memory that each rank needs and,"
        " with --gpus, the time of a call, the fastest first. Only the pipeline's configuration is read. The other"
        " flags are those of the planned run, without degrees; --fully_shard_degree above 1 means all ranks of a"
        f" replica. Models that need no download: {', '.join(published())}.",
        epilog="Example: xdit plan --model flux.1-dev --gpus 4xH100 --compile",
    )
    flags.add_argument("--world_size", type=int, metavar="N", help="Number of ranks; lists memory only.")
    flags.add_argument("--gpus", metavar="NxNAME", help="Number and name of the devices of a node, such as 8xL40.")
    flags.add_argument("--links", metavar="KIND", help="pcie, nvlink, or a rate such as 64GB; else the data sheet's.")
    flags.add_argument("--nodes", type=int, default=1, metavar="N", help="Nodes that each have --gpus (default: 1).")
    flags.add_argument("--node_link", metavar="RATE", help="Rate between nodes, such as 100gbit (the default).")
    flags.add_argument("--objective", default="latency", help=f"Sort by {', '.join(OBJECTIVES)} (default: latency).")
    flags.add_argument("--compile", action="store_true", help="Plan for compiled blocks, as with --use_torch_compile.")
    flags.add_argument("--exact", action="store_true", help="Omit methods that change the image slightly.")
    flags.add_argument("--explain", metavar="CONFIG", help="Explain the numbers of a row; 'best' means the first.")
    flags.add_argument("--scale", nargs="+", type=int, metavar="N", help="Show the best row for each rank count.")
    flags.add_argument("--picture", metavar="FILE", default="plan.png", help="PNG chart (default: plan.png).")
    flags.add_argument("--calibrate", action="store_true", help="Measure this machine, and store its constants.")
    return xFuserArgs.add_cli_args(flags)
