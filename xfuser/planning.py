"""``xdit plan``: which degrees of parallelism a number of ranks can be put to."""

from xfuser.config import FlexibleArgumentParser
from xfuser.config.config import in_words, legal_degrees


def main(arguments: list[str]) -> int:
    """Print every legal combination of degrees; returns the exit code."""
    options = parser().parse_args(arguments)
    for degrees in legal_degrees(options.world_size):
        print(in_words(degrees))
    return 0


def parser() -> FlexibleArgumentParser:
    """The flags of ``xdit plan``."""
    flags = FlexibleArgumentParser(prog="xdit plan", description="List the combinations of degrees of parallelism.")
    flags.add_argument("--world_size", type=int, required=True, metavar="N", help="Number of ranks.")
    return flags
