"""The matrix of what runs: every known transformer under every method, against its own result in one process.

``python -m xfuser.testing.matrix`` runs it with the installed Diffusers and prints it as Markdown.
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
# Kandinsky 5 rotates queries and keys in bfloat16, which blows the last bits of other batch sizes up; so does the
# recurrence of SANA-WM, whose forward in float32 is 2e-4 from that in float64. Stable Audio's rounding grows by steps.
TOLERANCES = {"kandinsky5": 1e-4, "sana_wm": 1e-4, "stable_audio": 3e-5}
TRANSFORMERS = "diffusers.models.transformers."  # where Diffusers keeps them
BREAKING = {"HiDreamImageTransformer2DModel", "MochiTransformer3DModel"}  # their blocks read values of tensors
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
    """Why this cell is refused; None where it runs."""
    plan = PLANS[FAMILIES[family].cls]
    if "pipefusion" in method:
        return plan.unpiped
    if "fusion" in method:
        return None if plan.patched else plan.unsequenced
    return plan.unsequenced if "ulysses" in method or "ring" in method else None


def draw(family: str, degrees: dict[str, Any] | None, call: dict[str, Any]) -> list[torch.Tensor]:
    """What the family's tiny loop returns, wrapped with these degrees, or bare where they are None."""
    return draw_family(FAMILIES[family], degrees, call)


def draw_family(family: Family, degrees: dict[str, Any] | None, call: dict[str, Any]) -> list[torch.Tensor]:
    """As :func:`draw`, for a family that need not be in the zoo."""
    pipe = loop_of(family)
    if degrees is None:
        return pipe(family, **call)
    parallel = xDiTParallel(pipe, *xFuserArgs(**degrees).create_config())
    result = parallel(family, **call)
    parallel.unwrap()
    return result


def reference(family: str, degrees: dict[str, Any], call: dict[str, Any], *place: Any) -> list[torch.Tensor]:
    """What a cell must equal: serial; under PipeFusion, the oracle. ``place`` may be a device, and a dtype."""
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
    """max|a - b| / max|b|, the largest of all tensors."""
    pairs = zip(results, expected, strict=True)
    return max(((a.double() - b).abs().max() / b.abs().max()).item() for a, b in pairs)


def setting(family: str, method: str, **changes: Any) -> tuple[int, dict[str, Any], dict[str, Any]]:
    """Ranks, degrees and call of a cell; ``changes`` are those of the call."""
    ranks, degrees = METHODS[method]
    # Batched guidance of one image is what most calls are; data parallelism needs more images than replicas.
    steps = 3 if "fusion" in method else 2
    call = {"images": 3 if method == "dp2" else 1, "num_inference_steps": steps} | changes
    plan = PLANS[FAMILIES[family].cls]
    if method == "distrifusion2" and (plan.unpiped or plan.in_patches or plan.linear or plan.padded):
        degrees = degrees | {"warmup_steps": steps}  # the oracle knows the tokens of the others alone
    return ranks, degrees, call


def cell(family: str, method: str, pool: RankPool, **changes: Any) -> float:
    """The largest error of any rank; ``changes`` are those of the call."""
    ranks, degrees, call = setting(family, method, **changes)
    expected = reference(family, degrees, call)
    return max(error(result, expected) for result in pool.run(ranks, draw, family, degrees, call))


def rows(families: list[str], pool: RankPool) -> Iterator[str]:
    """The matrix as lines of Markdown; what is wrong stands in bold."""
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
    """What is served by what, as lines of Markdown: the tables of the README, one for each kind."""
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
    """Why PipeFusion is refused where it is, as lines of Markdown."""
    refused = {cls: plan.unpiped for cls, plan in sorted(PLANS.items()) if plan.unpiped}
    return _reasons(refused)


def reasons() -> list[str]:
    """Why classes have no plan, as lines of Markdown."""
    return _reasons(UNSERVED)


def _reasons(by_class: dict[str, str]) -> list[str]:
    return ["| transformer | why not |", "|---|---|", *(f"| `{cls}` | {why} |" for cls, why in by_class.items())]


def unknown_classes() -> list[str]:
    """The transformer classes of the installed Diffusers that have neither a plan nor a reason why not."""
    names = [name for name in dir(diffusers) if name not in PLANS | UNSERVED]
    return [name for name in names if getattr(getattr(diffusers, name), "__module__", "").startswith(TRANSFORMERS)]


def main() -> None:
    """Run the matrix, or print what is supported."""
    parser = argparse.ArgumentParser(prog="python -m xfuser.testing.matrix", description=__doc__)
    parser.add_argument("families", nargs="*", default=list(FAMILIES), help=f"of {', '.join(FAMILIES)}; all by default")
    parser.add_argument("--support", action="store_true", help="print what is supported, and run nothing")
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
