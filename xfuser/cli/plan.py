"""``xdit plan``: which degrees of parallelism a number of ranks can be put to, and what memory each takes."""

from dataclasses import replace

from xfuser.config import FlexibleArgumentParser, xFuserArgs
from xfuser.core import device as devices
from xfuser.planner.table import COLUMNS, plan


def main(arguments: list[str]) -> int:
    """Print what every legal combination of degrees takes; returns 1 where memory is given and none fits."""
    options = parser().parse_args(arguments)
    args = xFuserArgs.from_cli_args(options)
    if not any(args.prompt):
        args = replace(args, prompt="a")
    if options.world_size < 1:
        raise ValueError(f"world_size={options.world_size} must be 1 or more")
    rows = plan(args, options.world_size)
    memory = args.checked()[0].runtime_config.memory or devices.total_memory()
    width = max(len(row.name) for row in rows)
    print(f"GB of a rank, {args.dtype}, {options.world_size} ranks")
    print(f"{'':{width}}  " + "  ".join(COLUMNS))
    for row in sorted(rows, key=lambda row: row.peak):
        print(f"{row.name:{width}}  {row.text(memory)}")
    return 0 if memory is None or any(row.fits(memory) for row in rows) else 1


def parser() -> FlexibleArgumentParser:
    """The flags of ``xdit plan``: those of ``xdit``, and the number of ranks."""
    flags = FlexibleArgumentParser(
        prog="xdit plan",
        description="List the legal combinations of degrees of parallelism with the memory that a rank needs, by the"
        " pipeline's configuration alone. The other flags are those that the run is to have; degrees are not given,"
        " and --fully_shard_degree above 1 means all ranks of a replica.",
        epilog="Example: xdit plan --model black-forest-labs/FLUX.1-dev --world_size 4 --memory 24GB --dtype bf16",
    )
    flags.add_argument("--world_size", type=int, required=True, metavar="N", help="Number of ranks.")
    return xFuserArgs.add_cli_args(flags)
