"""A pipeline with injected faults: the number of steps of a call selects the fault.

Diffusers loads this file from the folder of the pipeline copy, with ``trust_remote_code``.
"""

import json
import os
import shutil
import time
from typing import Any

from diffusers import DPMSolverMultistepScheduler

from xfuser.config.args import SHIPPED_PIPELINE
from xfuser.core.distributed import get_world_group

RAISES, RAISES_ON_LAST_RANK, HANGS_ON_LAST_RANK, REFUSES_BATCHES = 11, 12, 13, 14
ONLY_ALONE, ONLY_TOGETHER, NEVER_FITS = 15, 16, 17  # out of memory with several images, on one rank, or always
SLOW = 36
SECONDS = 0.15  # of a slow step


class FaultyScheduler(DPMSolverMultistepScheduler):
    """The scheduler of the shipped pipeline, with faults after the first forward."""

    def step(self, model_output: Any, timestep: Any, sample: Any, *args: Any, **kwargs: Any) -> Any:
        """Step as the shipped pipeline does, with the fault that the number of steps selects."""
        steps, rank = self.num_inference_steps, int(os.environ.get("RANK", "0"))
        is_last = rank == int(os.environ.get("WORLD_SIZE", "1")) - 1
        if steps == RAISES or (steps == RAISES_ON_LAST_RANK and is_last):
            raise RuntimeError("a fault was asked for")
        if steps == NEVER_FITS or (steps == ONLY_ALONE and len(sample) > 1):
            raise MemoryError("a fault was asked for")
        if steps == ONLY_TOGETHER and get_world_group().world_size == 1:
            raise MemoryError("a fault was asked for")
        if steps == REFUSES_BATCHES and len(sample) > 1:
            raise ValueError("a fault was asked for")
        if steps == HANGS_ON_LAST_RANK and is_last:
            time.sleep(3600)
        if steps == SLOW:
            time.sleep(SECONDS)
        return super().step(model_output, timestep, sample, *args, **kwargs)


def faulty_pipeline(folder: str) -> str:
    """Copy the shipped pipeline to ``folder``, with the faulty scheduler, and return the path."""
    path = os.path.join(folder, "faulty")
    shutil.copytree(SHIPPED_PIPELINE, path)
    shutil.copy(__file__, os.path.join(path, "scheduler", "faults.py"))
    index = os.path.join(path, "model_index.json")
    with open(index, encoding="utf-8") as file:
        parts = json.load(file) | {"scheduler": ["faults", FaultyScheduler.__name__]}
    with open(index, "w", encoding="utf-8") as file:
        json.dump(parts, file)
    return path
