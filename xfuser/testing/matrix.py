"""The support matrix: every known transformer under every method, compared with its own result in one process.

``python -m xfuser.testing.matrix`` runs the matrix with the installed Diffusers and prints it as Markdown.
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import diffusers
import torch

from xfuser import xDiTParallel, xFuserArgs
from xfuser.models.registry import PLANS
from xfuser.models.unserved import UNSERVED
from xfuser.testing import oracle
from xfuser.testing.loop import loop_of
from xfuser.testing.ranks import RankPool
from xfuser.testing.zoo import FAMILIES, KINDS, Family

TOLERANCE = 1e-5
# Kandinsky 5 rotates queries and keys in bfloat16, which amplifies rounding differences between batch sizes; so does
# the recurrence of SANA-WM (float32 differs from float64 by 2e-4). Rounding errors of Stable Audio grow with the steps.
TOLERANCES = {"kandinsky5": 1e-4, "sana_wm": 1e-4, "stable_audio": 3e-5}
TRANSFORMERS = "diffusers.models.transformers."  # Diffusers' package of transformers
BREAKING = {"HiDreamImageTransformer2DModel", "MochiTransformer3DModel"}  # blocks that read tensor values
PIPED = {"pipefusion_parallel_degree": 2, "warmup_steps": 1}
METHODS: dict[str, tuple[int, dict[str, Any]]] = {  # ranks, degrees
    "ulysses2": (2, {"ulysses_degree": 2}),
    "ring2": (2, {"ring_degree": 2}),
    "ulysses2 x ring2": (4, {"ulysses_degree": 2, "ring_degree": 2}),
    "cfg2": (2, {"use_cfg_parallel": True}),
    "dp2": (2, {"data_parallel_degree": 2}),
    "distrifusion2": (2, {"distrifusion_degree": 2, "warmup_steps": 1}),
    "pipefusion2 M=3": (2, PIPED | {"num_pipeline_patch": 3}),
    "tensor2": (2, {"tensor_parallel_degree": 2}),
    "pipefusion2 M=2 x ulysses2": (4, PIPED | {"num_pipeline_patch": 2, "ulysses_degree": 2}),
}


def refusal(family: str, method: str) -> str | None:
    """Return why this cell is refused; None if it runs."""
    plan = PLANS[FAMILIES[family].cls]
    if "pipefusion" in method:
        return plan.unpiped
    if "fusion" in method:
        return None if plan.patched else plan.unsequenced
    return plan.unsequenced if "ulysses" in method or "ring" in method else None


def draw(family: str, degrees: dict[str, Any] | None, call: dict[str, Any]) -> list[torch.Tensor]:
    """Run the family's tiny loop, wrapped with these degrees, or unwrapped if they are None."""
    return draw_family(FAMILIES[family], degrees, call)


def draw_family(family: Family, degrees: dict[str, Any] | None, call: dict[str, Any]) -> list[torch.Tensor]:
    """Like :func:`draw`, for a family that may not be in the zoo."""
    pipe = loop_of(family)
    if degrees is None:
        return pipe(family, **call)
    parallel = xDiTParallel(pipe, *xFuserArgs(**degrees).create_config())
    result = parallel(family, **call)
    parallel.unwrap()
    return result


def reference(family: str, degrees: dict[str, Any], call: dict[str, Any], *place: Any) -> list[torch.Tensor]:
    """Return the expected result of a cell: serial, or the oracle for PipeFusion and asynchronous DistriFusion.

    ``place`` may hold a device and a dtype.
    """
    pipe = loop_of(FAMILIES[family]).to(*place)
    if "num_pipeline_patch" in degrees:
        semantics = oracle.displaced(pipe, degrees["num_pipeline_patch"], degrees["warmup_steps"])
    elif degrees.get("warmup_steps") == 1:
        semantics = oracle.distrifusion(pipe, degrees["distrifusion_degree"], degrees["warmup_steps"])
    else:
        semantics = nullcontext()
    with semantics:
        return pipe(FAMILIES[family], **call)


def error(results: list[torch.Tensor], expected: list[torch.Tensor]) -> float:
    """Return max|a - b| / max|b|, the largest over all tensors."""
    pairs = zip(results, expected, strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def setting(family: str, method: str, **changes: Any) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Return ranks, degrees and call of a cell; ``changes`` override arguments of the call."""
    ranks, degrees = METHODS[method]
    # Most calls are batched guidance of one image; data parallelism needs more images than replicas.
    steps = 3 if "fusion" in method else 2
    call = {"images": 3 if method == "dp2" else 1, "num_inference_steps": steps} | changes
    plan = PLANS[FAMILIES[family].cls]
    if method == "distrifusion2" and (plan.unpiped or plan.in_patches or plan.linear or plan.padded):
        degrees = degrees | {"warmup_steps": steps}  # the oracle supports only the other classes
    return ranks, degrees, call


def cell(family: str, method: str, pool: RankPool, **changes: Any) -> float:
    """Return the largest error of any rank; ``changes`` override arguments of the call."""
    ranks, degrees, call = setting(family, method, **changes)
    expected = reference(family, degrees, call)
    return max(error(result, expected) for result in pool.run(ranks, draw, family, degrees, call))


def rows(families: list[str], pool: RankPool) -> Iterator[str]:
    """Yield the matrix as lines of Markdown, with failures in bold."""
    yield "| class | " + " | ".join(METHODS) + " |"
    yield "|---" * (len(METHODS) + 1) + "|"
    for family in families:
        yield f"| `{FAMILIES[family].cls}` | " + " | ".join(_entry(family, method, pool) for method in METHODS) + " |"


def _entry(family: str, method: str, pool: RankPool) -> str:
    if not FAMILIES[family].present:
        return "absent"
    if refusal(family, method):
        return "refused"
    try:
        found = cell(family, method, pool)
    except Exception as problem:  # whatever another release of Diffusers brings
        print(f"{family}, {method}: {problem}", file=sys.stderr)
        return f"**{type(problem).__name__}**"
    return f"{found:.0e}" if found <= TOLERANCES.get(family, TOLERANCE) else f"**{found:.0e}**"


def support() -> list[str]:
    """Return which class supports which method, as lines of Markdown: the tables of the README, one for each kind."""
    lines = []
    for kind, families in KINDS.items():
        lines += [
            f"| {kind} transformer | models | Ulysses, ring, both | CFG | data | tensor | PipeFusion | compiled |",
            "|---|---|:-:|:-:|:-:|:-:|:-:|:-:|",
        ]
        for family in sorted(families.values(), key=lambda one: one.cls):
            plan = PLANS[family.cls]
            split, piped = ("no" if reason else "✓" for reason in (plan.unsequenced, plan.unpiped))
            compiled = "breaks" if family.cls in BREAKING else "✓" if plan.blocks else "eager"
            lines.append(f"| `{family.cls}` | {family.models} | {split} | ✓ | ✓ | ✓ | {piped} | {compiled} |")
        lines.append("")
    return lines[:-1]


def refusals() -> list[str]:
    """Return the classes for which PipeFusion is refused, with the reasons, as lines of Markdown."""
    refused = {cls: plan.unpiped for cls, plan in sorted(PLANS.items()) if plan.unpiped}
    return _reasons(refused)


def reasons() -> list[str]:
    """Return the classes without a plan, with the reasons, as lines of Markdown."""
    return _reasons(UNSERVED)


def _reasons(by_class: dict[str, str]) -> list[str]:
    return ["| transformer | why not |", "|---|---|", *(f"| `{cls}` | {why} |" for cls, why in by_class.items())]


def unknown_classes() -> list[str]:
    """Return the transformer classes of the installed Diffusers with neither a plan nor a reason for having none."""
    names = [name for name in dir(diffusers) if name not in PLANS | UNSERVED]
    return [name for name in names if getattr(getattr(diffusers, name), "__module__", "").startswith(TRANSFORMERS)]


def main() -> None:
    """Run the matrix, or print what is supported."""
    parser = argparse.ArgumentParser(prog="python -m xfuser.testing.matrix", description=__doc__)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), help=f"of {', '.join(FAMILIES)} (default: all)")
    parser.add_argument("--support", action="store_true", help="print the support tables without running the matrix")
    asked = parser.parse_args()
    if left := unknown_classes():
        print(f"neither plan nor reason: {', '.join(left)}", file=sys.stderr)
    if asked.support:
        print("\n".join([*support(), "", *refusals(), "", *reasons()]))
        return
    families = asked.families
    unknown = set(families) - set(FAMILIES)
    if unknown:
        parser.error(f"unknown: {', '.join(sorted(unknown))}; known are {', '.join(FAMILIES)}")
    torch.set_num_threads(1)
    pool = RankPool(4)
    wrong = False
    try:
        for line in rows(families, pool):
            print(line, flush=True)
            wrong |= "**" in line
    finally:
        pool.close()
    sys.exit(int(wrong))


if __name__ == "__main__":
    main()
