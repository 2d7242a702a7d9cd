"""The report as Markdown: a list of paths, each ticked, failed or not run, and the checks of each path."""

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version

import torch

from xfuser.core import device as devices
from xfuser.core.attention.kernels import KERNELS

PATHS = {  # the same titles as in docs/design.md
    **{f"kernel {name}": f"the attention kernel `{name}`, causal or not, and its LSE" for name in KERNELS},
    "shared": "all methods with ranks that share one GPU, over gloo",
    "compiled": "compiled blocks on an accelerator",
    "loading": "loading onto an accelerator: parts of tensors that ranks hand each other",
    "shards": "`--fully_shard_degree` and `--text_encoder shard`; `--text_encoder offload` between a host and a device",
    "offload": "`--enable_model_cpu_offload`, `--enable_sequential_cpu_offload`",
    "vae": "the parallel VAE, and `--vae_chunk_rows auto` from an accelerator's free memory",
    "nccl": "`nccl` as the backend: Ulysses, ring, CFG and data parallelism, a gloo group beside each group",
    "channels": "PipeFusion's channels on `nccl`: two-rank communicators, and receives that are posted early",
    "distrifusion": "DistriFusion on `nccl`: batches of two-way sends and receives on the group's communicator",
    "tensor": "tensor parallelism on `nccl`",
    "overlap": "communication that is hidden behind compute",
    "speed": "blocks of the sizes of Flux and Wan, beside Diffusers' own context parallelism",
    "commands": "`xdit bench` and `xdit plan` on an accelerator",
}
MARKS = {"passed": "ok", "failed": "**failed**", "not run": "not run"}


@dataclass(frozen=True)
class Check:
    """One check: its path, its name, and the function that runs it.

    Attributes:
        run: returns the measurements as text; raises if the check fails.
        missing: why the check cannot run here; None if it can.
    """

    path: str
    name: str
    run: Callable[[], str]
    missing: str | None = None


@dataclass(frozen=True)
class Outcome:
    """The result of a check: ``passed``, ``failed`` or ``not run``, and the measurements or the reason."""

    check: Check
    status: str
    detail: str
    seconds: float = 0.0


def outcome_of(check: Check) -> Outcome:
    """Run a check; any exception counts as a failure."""
    if check.missing:
        return Outcome(check, "not run", check.missing)
    start = time.perf_counter()
    try:
        status, detail = "passed", check.run()
    except Exception as error:  # a failed check must not end the report
        status, detail = "failed", _last_line(error)
    return Outcome(check, status, detail, time.perf_counter() - start)


def _last_line(error: Exception) -> str:
    """Return the message of an error; for failed ranks, the last line of the first traceback."""
    lines = str(error).split("\nrank 1:")[0].strip().splitlines() or [""]
    return f"{type(error).__name__}: {lines[-1]}"


def state_of(path: str, outcomes: list[Outcome], accelerated: bool) -> tuple[str, str]:
    """Return the box of a path and its text; it is ticked if all of its checks ran on an accelerator and passed."""
    own = [one for one in outcomes if one.check.path == path]
    failed = [one for one in own if one.status == "failed"]
    passed = [one for one in own if one.status == "passed"]
    if failed:
        return "[ ]", f"**failed**: {failed[0].check.name}: {failed[0].detail}"
    if not passed:
        return "[ ]", f"not run: {own[0].detail if own else 'no check of it was asked for'}"
    if not accelerated:
        return "[ ]", f"not run on a GPU; {len(passed)} of {len(own)} checks passed on the CPU"
    left = [one for one in own if one.status == "not run"]
    told = f"{len(passed)} of {len(own)} checks passed"
    return ("[ ]", f"in part: {told}; {left[0].check.name} not run: {left[0].detail}") if left else ("[x]", told)


def render(outcomes: list[Outcome], accelerated: bool) -> str:
    """Return the report."""
    lines = ["# xfuser on this machine", "", *map("- {}".format, described()), "", "## Paths", ""]
    for path, title in PATHS.items():
        box, told = state_of(path, outcomes, accelerated)
        lines.append(f"- {box} {title} — {told}")
    lines += ["", "## Checks", "", "| path | check | | s | |", "|---|---|---|--:|---|"]
    for one in outcomes:
        detail = one.detail.replace("|", "\\|")
        lines.append(f"| {one.check.path} | {one.check.name} | {MARKS[one.status]} | {one.seconds:.1f} | {detail} |")
    count = {status: sum(one.status == status for one in outcomes) for status in MARKS}
    lines += ["", ", ".join(f"{number} {status}" for status, number in count.items())]
    return "\n".join(lines)


def described() -> list[str]:
    """Describe the machine and the installed packages."""
    kind = devices.device_type()
    count = torch.accelerator.device_count() if kind != "cpu" else 0
    return [
        f"{devices.device_name()}, {count or 'no'} accelerator{'s' * (count != 1)}, {platform.platform()}",
        f"torch {torch.__version__}, diffusers {version('diffusers')}, Python {platform.python_version()}",
    ]
