"""Count the exit codes of scripts that end without any cleanup: ``python -m xfuser.bench.exits --runs 200``.

Must be started in a checkout, as one of the scripts is in ``docs``.
"""

import argparse
import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

import torch.distributed as dist

RANKS = 2
PATIENCE = 300  # timeout of a run in seconds
TOLD = 600  # last characters to print of the output of a rank that did not exit with 0

WRAP = """
import torch
from diffusers import DiffusionPipeline
from xfuser import xDiTParallel, xFuserArgs
from xfuser.config.args import SHIPPED_PIPELINE

engine_config, input_config = xFuserArgs(ulysses_degree=2).create_config()
pipe = DiffusionPipeline.from_pretrained(SHIPPED_PIPELINE)
pipe = xDiTParallel(pipe, engine_config, input_config)
image = pipe("a red circle", num_inference_steps=2, height=64, width=64, output_type="latent").images[0]
"""
CLIENT = """
import torch
from xfuser.core.distributed import get_sp_group, init_distributed_environment, initialize_model_parallel
from xfuser.core.long_ctx_attention import xFuserLongContextAttention

init_distributed_environment()
initialize_model_parallel(ring_degree=2)
group = get_sp_group().ring_group
q, k, v = torch.randn(3, 1, 16, 4, 8).unbind()
out = xFuserLongContextAttention()(None, q, k, v)
"""
SCRIPTS = {
    "tutorial": ["docs/adding_models/cfg_parallel.py"],
    "wrap": ["-c", WRAP],
    "client": ["-c", CLIENT],
}  # arguments of Python


def exit_codes(script: list[str], ranks: int = RANKS) -> tuple[list[int | None], list[str]]:
    """Run a script once; returns each rank's exit code, None if it did not end, and its output.

    Ranks connect as under torchrun, through a store that this process holds, but a failed rank does not end the others.
    """
    store = dist.TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    shared = os.environ | {
        "WORLD_SIZE": str(ranks),
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
    }
    with tempfile.TemporaryDirectory() as folder:
        logs = [Path(folder, f"rank{rank}") for rank in range(ranks)]
        processes = []
        for rank, log in enumerate(logs):
            own = shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with log.open("wb") as file:
                command = [sys.executable, *script]
                processes.append(subprocess.Popen(command, env=own, stdout=file, stderr=subprocess.STDOUT))
        codes = [_exit_code(process) for process in processes]
        return codes, [log.read_text(errors="replace") for log in logs]


def _exit_code(process: subprocess.Popen) -> int | None:
    try:
        return process.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
        return None


def main() -> int:
    """Run each script several times and print the counts; returns 1 if a rank did not exit with 0."""
    flags = argparse.ArgumentParser(prog="python -m xfuser.bench.exits", description=__doc__.partition("\n")[0])
    flags.add_argument("--runs", type=int, default=200, help="Runs of each script (default: 200).")
    flags.add_argument("--scripts", nargs="+", choices=SCRIPTS, default=list(SCRIPTS), help="Which (default: all).")
    options = flags.parse_args()
    failed = False
    for name in options.scripts:
        counts: Counter[str] = Counter()
        for run in range(options.runs):
            codes, written = exit_codes(SCRIPTS[name])
            counts[", ".join(str(code) for code in codes)] += 1
            for rank, (code, text) in enumerate(zip(codes, written, strict=True)):
                if code != 0:
                    failed = True
                    print(f"{name}, run {run}, rank {rank} exited with {code}:\n{text[-TOLD:]}", flush=True)
        told = "; ".join(f"{codes}: {count}" for codes, count in counts.most_common())
        print(f"{name}: runs by the exit codes of their ranks: {told}", flush=True)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
