"""One rank: loads the pipeline, and runs the calls that the engine sends, one at a time."""

import inspect
import io
import os
import tempfile
import threading
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from PIL import Image
from torch.distributed import DistError
from torch.nn import functional
from tqdm import tqdm

from xfuser.config import EngineConfig, InputConfig, xFuserArgs
from xfuser.core.distributed import get_world_group
from xfuser.core.distributed.teams import Groups, form_teams, in_team
from xfuser.parallel import xDiTParallel
from xfuser.pipeline_io.media import media_of, png, write_media
from xfuser.serve import elastic
from xfuser.weights.loading import load_pipeline

SMALL = 32  # minimum latent height and width for which a preview is halved

Teams = dict[int, tuple[Groups, Any]]  # by number of ranks: groups, and the pipeline wrapped for them


class Cancelled(Exception):
    """All jobs of a call were cancelled: ends the pipeline's loop on all ranks, after the same step."""


def serve(args: xFuserArgs, is_elastic: bool, connections: list[Connection]) -> None:
    """Load the pipeline, and run calls until the engine closes this rank's connection."""
    tqdm.set_lock(threading.RLock())  # instead of a semaphore, which outlives a killed rank
    engine = connections.pop(int(os.environ["RANK"]))
    for connection in connections:
        connection.close()
    engine_config, inputs = args.create_config()
    pipe = load_pipeline(engine_config, inputs)
    pipe.set_progress_bar_config(disable=True)
    teams = teams_of(pipe, engine_config, inputs, is_elastic)
    try:
        engine.send(("ready", abilities(pipe)))
        while True:
            name, *rest = engine.recv()
            if name == "draw":  # else "cancel", for a call that has ended
                engine.send(("end", draw(teams, inputs, *rest, engine)))
    except (EOFError, ConnectionError):
        os._exit(0)  # the engine is gone; destroying the process groups could wait for other ranks


def teams_of(pipe: Any, engine_config: EngineConfig, inputs: InputConfig, is_elastic: bool) -> Teams:
    """Wrap the pipeline for each number of ranks on which a call may run; creates all process groups."""
    teams: Teams = {}
    for size in elastic.sizes_of(engine_config.world_size, is_elastic):
        parallel = elastic.degrees_of(engine_config.parallel_config, size)
        groups = form_teams(size, **parallel.group_degrees)
        with in_team(groups):
            teams[size] = groups, xDiTParallel(pipe, replace(engine_config, parallel_config=parallel), inputs)
    return teams


def abilities(pipe: Any) -> dict[str, Any]:
    """What this pipeline supports in requests."""
    takes = _takes(pipe)
    return {
        "pipeline": type(pipe).__name__,
        "videos": "num_frames" in takes or "video_length" in takes,
        "pictures": "image" in takes,
        "multiple": 2 * getattr(pipe, "vae_scale_factor", getattr(pipe, "vae_scale_factor_spatial", 8)),
    }


def draw(
    teams: Teams, inputs: InputConfig, size: int, batch: list[dict[str, Any]], engine: Connection | None
) -> tuple[str, Any]:
    """Run the jobs of a call on this rank's team of ``size`` ranks; return how it ended, and the encoded results or
    a message for the client. An exception of the pipeline ends the call, not the rank.
    """
    groups, pipe = teams[size]
    try:
        with in_team(groups):
            output = pipe(**arguments(pipe, inputs, batch), **Steps(pipe, batch, engine).argument())
            results = media_of(output)
            return "done", [encoded(item) for item in results] if get_world_group().is_first_rank else None
    except Cancelled:
        return "cancelled", None
    except ValueError as error:
        return "invalid", str(error)
    except Exception as error:
        # the engine is gone, or the device or the process groups can no longer be used
        if isinstance(error, ConnectionError | DistError) or type(error).__name__ == "AcceleratorError":
            raise
        memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        return "memory" if memory else "error", f"{type(error).__name__}: {error}"


def arguments(pipe: Any, inputs: InputConfig, batch: list[dict[str, Any]]) -> dict[str, Any]:
    """The pipeline's arguments for a batch; each job has its own generator."""
    prompts = {name: [job[name] for job in batch] for name in ("prompt", "negative_prompt")}
    pipe.input_config = replace(inputs, **prompts, **batch[0]["settings"])
    given = pipe.call_arguments()
    generators = [torch.Generator("cpu").manual_seed(job["seed"]) for job in batch]
    given["generator"] = generators if len(batch) > 1 else generators[0]
    if batch[0]["image"]:
        given["image"] = Image.open(io.BytesIO(batch[0]["image"])).convert("RGB")
    return given


class Steps:
    """After each step, on all ranks: sends progress and previews to the engine, and receives cancellations."""

    def __init__(self, pipe: Any, batch: list[dict[str, Any]], engine: Connection | None) -> None:
        self._pipe, self._batch, self._engine = pipe, batch, engine
        self._first, self._cancelled = get_world_group().is_first_rank and engine is not None, set()

    def argument(self) -> dict[str, Any]:
        """The pipeline's step callback argument; a pipeline without one cannot be interrupted."""
        takes = _takes(self._pipe._pipe)
        if "callback_on_step_end" in takes:
            return {"callback_on_step_end": lambda pipe, step, t, values: self(step, values.get("latents")) or {}}
        return {"callback": lambda step, t, latents: self(step, latents)} if "callback" in takes else {}

    def __call__(self, step: int, latents: torch.Tensor | None) -> None:
        """Called after each step; raises :class:`Cancelled` if all jobs of the batch are cancelled."""
        while self._first and self._engine.poll():
            self._cancelled |= self._engine.recv()[1]
        if get_world_group().world_size > 1:
            self._cancelled = get_world_group().broadcast_object(self._cancelled)
        if self._cancelled.issuperset(job["id"] for job in self._batch):
            raise Cancelled
        previews = self._previews(step + 1, latents) if latents is not None else {}
        if self._first:
            self._engine.send(("step", (step + 1, previews)))

    def _previews(self, done: int, latents: torch.Tensor) -> dict[str, bytes]:
        """Previews of the jobs that need one at this step, decoded by all ranks together."""
        settings = self._batch[0]["settings"]
        last = done == settings["num_inference_steps"]
        every = [0 if last else job["preview_every"] for job in self._batch]
        rows = [row for row, steps in enumerate(every) if steps and done % steps == 0]
        pictures = preview(self._pipe, latents[rows], settings) if rows else []
        return {self._batch[row]["id"]: encoded(picture) for row, picture in zip(rows, pictures, strict=False)}


def preview(pipe: Any, latents: torch.Tensor, settings: dict[str, Any]) -> list[Image.Image]:
    """Decode latents, large ones at half their height and width; empty unless they are images ``[B, C, H, W]``."""
    height, width = settings.get("height"), settings.get("width")
    if latents.dim() == 3 and height and width and hasattr(pipe, "_unpack_latents"):
        latents = pipe._unpack_latents(latents, height, width, pipe.vae_scale_factor)
    vae = getattr(pipe, "vae", None)
    if latents.dim() != 4 or not getattr(getattr(vae, "config", None), "scaling_factor", None):
        return []
    if min(latents.shape[-2:]) >= SMALL:
        latents = functional.avg_pool2d(latents, 2)
    latents = latents / vae.config.scaling_factor + (getattr(vae.config, "shift_factor", None) or 0)
    with torch.no_grad():
        pixels = vae.decode(latents.to(vae.dtype), return_dict=False)[0]
    return pipe.image_processor.postprocess(pixels, output_type="pil")


def encoded(item: Any) -> bytes:
    """Encode an image as PNG, a video as MP4 (GIF without an encoder), latents as safetensors."""
    if isinstance(item, Image.Image):
        return png(item)
    with tempfile.TemporaryDirectory() as folder, open(write_media(item, folder, "result"), "rb") as file:
        return file.read()


def _takes(pipe: Any) -> Any:
    return inspect.signature(type(pipe).__call__).parameters
