"""An argument parser that treats dashes and underscores in flags alike."""

import argparse
from collections.abc import Sequence
from typing import Any, NoReturn


class FlexibleArgumentParser(argparse.ArgumentParser):
    """``--ulysses-degree 2`` and ``--ulysses_degree=2`` are the same flag; bad input raises a ValueError."""

    def parse_known_args(self, args: Sequence[str] | None = None, namespace: Any = None) -> Any:
        """As in argparse, but flags may be written with hyphens instead of underscores."""
        if args is None:
            import sys

            args = sys.argv[1:]
        return super().parse_known_args([_with_underscores(arg) for arg in args], namespace)

    def error(self, message: str) -> NoReturn:
        """Raise a ValueError, where argparse would exit the process."""
        raise ValueError(f"{self.prog}: {message} (--help lists the flags)")


def _with_underscores(arg: str) -> str:
    if not arg.startswith("--"):
        return arg
    flag, equals, value = arg.partition("=")
    return "--" + flag[2:].replace("-", "_") + equals + value


class SwitchAction(argparse.Action):
    """A flag ``--x`` that sets True, and its opposite ``--no_x`` that sets False."""

    def __init__(self, option_strings: list[str], dest: str, default: bool = False, **kwargs: Any) -> None:
        flag = option_strings[0].removeprefix("--")
        self._opposite = "--" + (flag.removeprefix("no_") if flag.startswith("no_") else f"no_{flag}")
        super().__init__([option_strings[0], self._opposite], dest, nargs=0, default=default, **kwargs)

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        """Set True for the flag, False for its opposite."""
        setattr(namespace, self.dest, option_string != self._opposite)
