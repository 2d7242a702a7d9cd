"""``python -m xfuser.bench``: starts two ranks on this machine and prints tables of what the methods gain and cost."""

import argparse
import os
import platform
import tempfile

import torch
import torch.multiprocessing as mp

from xfuser.bench import pipeline, vae, vae_memory
from xfuser.bench.cases import CASES, run_case


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m xfuser.bench", description=__doc__)
    names = [*CASES, "pipefusion", "vae", "vae-memory"]
    flags.add_argument("--case", nargs="+", choices=names, default=names, help="Cases to run (default: all).")
    flags.add_argument("--rounds", type=int, default=5, help="Interleaved rounds; medians are shown (default: 5).")
    flags.add_argument("--timeline", metavar="FILE", help="Draw the timeline of the pipefusion case into this file.")
    flags.add_argument("--pixels", type=int, default=512, help="Side of the vae case's picture (default: 512).")
    options = flags.parse_args()
    print(f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, 2 ranks x 1 thread, float32\n")
    for name in options.case:
        titles = {"pipefusion": pipeline.TITLE, "vae": vae.TITLE.format(options.pixels), "vae-memory": vae_memory.TITLE}
        title = titles.get(name)
        print(f"## {title or CASES[name].title}\n", flush=True)
        with tempfile.TemporaryDirectory() as folder:
            store = os.path.join(folder, "store")
            if name == "pipefusion":
                mp.spawn(pipeline.run_pipeline, args=(options.rounds, store, options.timeline), nprocs=2)
            elif name == "vae":
                mp.spawn(vae.run_vae, args=(options.rounds, store, options.pixels), nprocs=2)
            elif name == "vae-memory":
                vae_memory.run_memory()
            else:
                mp.spawn(run_case, args=(name, options.rounds, store), nprocs=2)


if __name__ == "__main__":
    main()
