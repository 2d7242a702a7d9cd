"""``xdit doctor``: report what is installed, used and missing, and test that two ranks agree with one."""

import platform
import shutil
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import torch

from xfuser.config import FlexibleArgumentParser
from xfuser.config.config import DEGREES
from xfuser.core import compiler, device as devices
from xfuser.core.attention.kernels import AUTO, KERNELS, available_backends

PACKAGES = {  # package: consequence if it is missing
    "diffusers": "nothing works",
    "transformers": "pipelines with text encoders cannot be loaded",
    "accelerate": "no offloading to the CPU",
    "peft": "no LoRA adapters",
    "flash-attn": "attention uses the kernels of torch",
    "distvae": "no --vae_engine distvae",
    "imageio-ffmpeg": "videos are saved as GIF",
}
TOPOLOGY = ("nvidia-smi", "topo", "-m")
PATIENCE = 60  # seconds


def main(arguments: list[str]) -> int:
    """Print a report to paste into an issue; returns 1 if the self-test fails."""
    parser = FlexibleArgumentParser(prog="xdit doctor", description=__doc__)
    parser.add_argument("--no_test", action="store_true", help="Skip the self-test on two ranks.")
    asked = parser.parse_args(arguments)
    for title, lines in (("Here", here()), ("Used", used()), ("Missing", missing())):
        print(f"## {title}\n\n" + "\n".join(f"- {line}" for line in lines or ["nothing"]) + "\n")
    if links := topology():
        print(f"## Links\n\n```\n{links}\n```\n")
    if asked.no_test:
        return 0
    told, agree = self_test()
    print(f"## Self-test\n\n- {told}")
    return int(not agree)


def here() -> list[str]:
    """The installed packages and the accelerators."""
    count = torch.accelerator.device_count() if devices.device_type() != "cpu" else 0
    return [
        f"Python {platform.python_version()}, {platform.platform()}",
        f"torch {torch.__version__}, CUDA {torch.version.cuda or 'none'}, NCCL {devices.nccl_version() or 'none'}",
        f"{count} x {devices.device_name()}, {devices.total_memory() / 1e9:.0f} GB each"
        if count
        else f"no accelerator; {devices.device_name()}, {devices.free_memory() / 1e9:.0f} GB free",
        *(f"{name} {number}" for name in ("xfuser", *PACKAGES) if (number := installed(name))),
    ]


def installed(name: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def used() -> list[str]:
    """The kernels, backends and methods used on this machine."""
    first = next(name for name in AUTO if KERNELS[name].missing() is None)
    compiles = compiler.missing()
    return [
        f"device {devices.device_type()}, messages by {devices.backend()}, dtype {devices.default_dtype()}",
        f"attention kernels: {', '.join(available_backends()[2:])}; for the ring, {first} where it takes the tensors",
        f"methods: {', '.join(DEGREES)}, each on as many ranks as its degree",
        "blocks can be compiled" if compiles is None else f"blocks cannot be compiled: {compiles}",
    ]


def missing() -> list[str]:
    """The missing packages and devices, and the consequences."""
    lines = [f"{name}: {cost}" for name, cost in PACKAGES.items() if not installed(name)]
    if devices.device_type() == "cpu":
        return ["an accelerator: ranks share the cores of this machine, and no kernel of a GPU runs", *lines]
    if torch.accelerator.device_count() == 1:
        lines = ["a second accelerator: ranks cannot run side by side", *lines]
    return lines + [f"attention kernel {name}: {why}" for name in KERNELS if (why := KERNELS[name].missing())]


def topology() -> str:
    """The links between GPUs as reported by ``nvidia-smi``; empty if it is not installed."""
    if not shutil.which(TOPOLOGY[0]):
        return ""
    done = subprocess.run(TOPOLOGY, capture_output=True, text=True, timeout=PATIENCE)
    return (done.stdout or done.stderr).strip()


def self_test() -> tuple[str, bool]:
    """Compare an image of two ranks (Ulysses) with that of one rank; returns a report and whether they agree."""
    from xfuser.testing import matrix
    from xfuser.testing.gpu.ranks import Pools, drawn

    count = torch.accelerator.device_count() if devices.device_type() != "cpu" else 0
    pools, own, start = Pools(count, 2), count > 1, time.perf_counter()
    ranks, degrees, call = matrix.setting("flux", "ulysses2")
    try:
        expected = [x.cpu() for x in matrix.reference("flux", degrees, call, devices.device(0))]
        results = pools.of(own).run(ranks, drawn, "flux", degrees, call, torch.float32)
        worst = max(matrix.error(result, expected) for result, _ in results)
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return f"**failed** on two ranks: {str(error).strip().splitlines()[-1]}", False
    finally:
        pools.close()
    where = f"a device each, {devices.backend()}" if own else f"one {devices.device_type()}, gloo"
    agree = worst <= 1e-4
    told = f"two ranks ({where}) draw what one draws: relative error {worst:.0e}" if agree else f"**error {worst:.0e}**"
    return f"{told}; {time.perf_counter() - start:.0f} s", agree
