"""The cost of each method by its formula and by counters: the table of ``xdit bench --costs``.

The formulas are those of the papers (arXiv 2309.14509, 2310.01889, 2402.19481, 2405.14430, 1909.08053), in elements
that a rank sends and receives per step: p tokens, hs hidden size, L layers, N ranks. The counters count sent bytes.
"""

import statistics
from collections.abc import Callable
from typing import Any

FORMULAS: dict[str, tuple[str, Callable[[int, int], float]]] = {  # by flag: in units of p * hs, of layers and ranks
    "ulysses_degree": ("4/N · p·hs·L", lambda layers, ranks: 4 * layers / ranks),
    "ring_degree": ("2 · p·hs·L", lambda layers, ranks: 2 * layers),
    "distrifusion_degree": ("2 · p·hs·L", lambda layers, ranks: 2 * layers),
    "tensor_parallel_degree": ("4 · p·hs·L", lambda layers, ranks: 4 * layers),
    "pipefusion_parallel_degree": ("2 · p·hs", lambda layers, ranks: 2),
}
HEAD = """## Costs

p = {tokens:,} tokens, hs = {hidden}, L = {layers}, {element} bytes an element. Sent: by the rank that sends most, in a
step. Parameters, activations (live tensors other than buffers): of serial. Buffers: what outlives a step, also in
units of the keys and values of all layers (2 · p·hs·L).

| method | ranks | latency / serial | sent a step | formula | by formula | sent / formula | parameters | activations \
| buffers | of K and V |
|---|---|---|---|---|---|---|---|---|---|---|"""


def cost_table(told: list[dict[str, Any]]) -> list[str]:
    """The table as Markdown, for configurations of a single method; empty if there are none."""
    lines = [line for run in told if run["shape"] for row in run["rows"] if (line := _line(row, run))]
    return ["\n".join([HEAD.format(**told[0]["shape"]), *lines])] if lines else []


def _line(row: dict[str, Any], run: dict[str, Any]) -> str | None:
    """A row of the table; None for refused ones, combinations of methods, and the parallel VAE."""
    from xfuser.bench.report import megabytes

    flags = [word.partition("=")[0] for word in row["name"].split()]
    methods = [flag for flag in flags if flag.endswith("_degree") or flag == "use_cfg_parallel"]
    if "refused" in row or len(methods) != 1 or "use_parallel_vae" in flags:
        return None
    serial, one, shape = run["serial"], row["summary"], run["shape"]
    unit = shape["tokens"] * shape["hidden"] * shape["element"]
    compared = "outputs alone | |"
    if methods[0] in FORMULAS:
        formula, factor = FORMULAS[methods[0]]
        expected = factor(shape["layers"], run["ranks"]) * unit
        compared = f"{formula} | {megabytes(expected)} | {one['sent'] / expected:.2f}"
    return (
        f"| `{row['name']}` | {run['ranks']} | {one['seconds'] / statistics.median(serial['seconds']):.2f}"
        f" | {megabytes(one['sent'])} | {compared} | {one['parameters'] / serial['parameters'][0]:.2f}"
        f" | {one['activations'] / serial['live'][0]:.2f} | {megabytes(one['buffers'])}"
        f" | {one['buffers'] / (2 * unit * shape['layers']):.2f} |"
    )
