"""``python -m xfuser.bench``: starts two ranks on this machine and prints tables of what the methods gain and cost."""

import argparse
import os
import platform
import tempfile

import torch
import torch.multiprocessing as mp

from xfuser.bench.cases import CASES, run_case


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m xfuser.bench", description=__doc__)
    flags.add_argument("--case", nargs="+", choices=CASES, default=list(CASES), help="Cases to run (default: all).")
    flags.add_argument("--rounds", type=int, default=5, help="Interleaved rounds; medians are shown (default: 5).")
    options = flags.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, 2 ranks x 1 thread, float32\n")
    for name in options.case:
        print(f"## {CASES[name].title}\n")
        with tempfile.TemporaryDirectory() as folder:
            mp.spawn(run_case, args=(name, options.rounds, os.path.join(folder, "store")), nprocs=2)


if __name__ == "__main__":
    main()
