"""One rank: it loads the pipeline, and draws one call after the other that the engine sends."""

import inspect
import io
import os
import socket
import tempfile
import time
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import torch
from PIL import Image
from torch.nn import functional

from xfuser.config import EngineConfig, InputConfig, xFuserArgs
from xfuser.core.distributed import get_world_group
from xfuser.core.distributed.teams import Groups, form_teams, in_team
from xfuser.parallel import xDiTParallel
from xfuser.pipeline_io.media import media_of, write_media
from xfuser.serve import elastic
from xfuser.weights.loading import load_pipeline

SMALL = 32  # rows and columns of latents above which a preview has half of them
ROUNDS = 3  # calls of each size at the start, of which the last ones are measured
STEPS = 2  # of these calls

Teams = dict[int, tuple[Groups, Any]]  # by the number of ranks: groups, and the pipeline that is wrapped for them


class Cancelled(Exception):
    """All jobs of a call were cancelled: ends the pipeline's loop on all ranks, behind the same step."""


def serve(args: xFuserArgs, address: str, is_elastic: bool) -> None:
    """Load, connect to the engine's socket, and draw until the engine is gone."""
    engine_config, inputs = args.create_config()
    pipe = load_pipeline(engine_config, inputs)
    pipe.set_progress_bar_config(disable=True)
    rank, told = get_world_group().rank, abilities(pipe)
    teams = teams_of(pipe, engine_config, inputs, is_elastic)
    told["seconds"] = measured(teams, inputs, told["multiple"]) if is_elastic else {}
    own = socket.socket(socket.AF_UNIX)
    try:
        own.connect(address)
        engine = Connection(own.detach())
        engine.send(("ready", (rank, told)))
        while True:
            name, *rest = engine.recv()
            if name == "draw":  # or "cancel", of a call that has ended
                engine.send(("end", draw(teams, inputs, *rest, engine)))
    except (EOFError, ConnectionError):
        os._exit(0)  # the engine is gone; leaving the process groups could wait for other ranks


def teams_of(pipe: Any, engine_config: EngineConfig, inputs: InputConfig, is_elastic: bool) -> Teams:
    """The pipeline, wrapped for each number of ranks that a call may have; all process groups are made here."""
    teams: Teams = {}
    for size in elastic.sizes_of(engine_config.world_size, is_elastic):
        parallel = elastic.degrees_of(engine_config.parallel_config, size)
        groups = form_teams(size, **parallel.group_degrees)
        with in_team(groups):
            teams[size] = groups, xDiTParallel(pipe, replace(engine_config, parallel_config=parallel), inputs)
    return teams


def measured(teams: Teams, inputs: InputConfig, multiple: int) -> elastic.Measured:
    """Seconds of a step on each number of ranks that does not run out of memory, at half of the default sides and at
    these.

    Raises:
        ValueError: the pipeline fails otherwise.
    """
    found: elastic.Measured = {}
    sides = [inputs.height or elastic.SIDE, inputs.width or elastic.SIDE]
    halves = [max(multiple, side // 2 // multiple * multiple) for side in sides]
    for size in teams:
        ends = [_timed(teams, inputs, size, *one) for one in (halves, sides)]
        if all(kind == "done" for kind, _ in ends):
            found[size] = [details for _, details in ends]
        elif failed := [details for kind, details in ends if kind not in ("done", "memory")]:
            raise ValueError(f"elastic measures calls at {sides[1]}x{sides[0]} and half of it: {failed[0]}")
    return found


def _timed(teams: Teams, inputs: InputConfig, size: int, height: int, width: int) -> tuple[str, Any]:
    """How a call ended, and of one that is done its pixels and the seconds of a step."""
    settings = {"height": height, "width": width, "num_frames": inputs.num_frames}
    settings |= {"num_inference_steps": STEPS, "guidance_scale": inputs.guidance_scale}
    job = {"id": "", "prompt": "a", "negative_prompt": "a" * inputs.use_cfg_parallel, "seed": 0}
    job |= {"settings": settings, "image": None, "preview_every": 0}
    took = []
    for _ in range(ROUNDS):
        start = time.perf_counter()
        end = draw(teams, inputs, size, [job], None)
        took.append((time.perf_counter() - start) / STEPS)
        if end[0] in ("invalid", "error"):  # it may require a picture
            job["image"] = encoded(Image.new("RGB", (width, height)))
    return ("done", (elastic.pixels(settings), min(took[1:]))) if end[0] == "done" else end


def abilities(pipe: Any) -> dict[str, Any]:
    """What requests may ask of this pipeline."""
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
    """Draw the jobs of a call on this rank's team of so many ranks: how it ended, and the encoded results or what to
    tell the client. Whatever the pipeline raises is the call's end, not the rank's.
    """
    groups, pipe = teams[size]
    try:
        with in_team(groups):
            output = pipe(**arguments(pipe, inputs, batch), **callback(pipe, Steps(pipe, batch, engine)))
            results = media_of(output)
            return "done", [encoded(item) for item in results] if get_world_group().is_first_rank else None
    except Cancelled:
        return "cancelled", None
    except ConnectionError:
        raise
    except ValueError as error:
        return "invalid", str(error)
    except Exception as error:
        if type(error).__name__ == "AcceleratorError":  # nothing can run on the device from now on
            raise
        memory = isinstance(error, torch.OutOfMemoryError | MemoryError) or "can't allocate memory" in str(error)
        return "memory" if memory else "error", f"{type(error).__name__}: {error}"


def arguments(pipe: Any, inputs: InputConfig, batch: list[dict[str, Any]]) -> dict[str, Any]:
    """The pipeline's arguments for a batch; each job has a generator of its own."""
    prompts = {name: [job[name] for job in batch] for name in ("prompt", "negative_prompt")}
    wanted = replace(inputs, **prompts, **batch[0]["settings"])
    pipe.input_config = wanted
    given = pipe.call_arguments()
    generators = [torch.Generator("cpu").manual_seed(job["seed"]) for job in batch]
    given["generator"] = generators if len(batch) > 1 else generators[0]
    if batch[0]["image"]:
        given["image"] = Image.open(io.BytesIO(batch[0]["image"])).convert("RGB")
    return given


def callback(pipe: Any, steps: "Steps") -> dict[str, Any]:
    """The argument by which this pipeline tells of its steps; pipelines without one cannot be interrupted."""
    takes = _takes(pipe._pipe)
    if "callback_on_step_end" in takes:

        def behind_step(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
            steps(step, values.get("latents"))
            return {}

        return {"callback_on_step_end": behind_step}
    if "callback" in takes:
        return {"callback": lambda step, timestep, latents: steps(step, latents)}
    return {}


class Steps:
    """Behind each step, on all ranks: progress and previews to the engine, and its cancellations from it."""

    def __init__(self, pipe: Any, batch: list[dict[str, Any]], engine: Connection | None) -> None:
        self._pipe, self._batch, self._engine = pipe, batch, engine
        self._first, self._cancelled = get_world_group().is_first_rank and engine is not None, set()

    def __call__(self, step: int, latents: torch.Tensor | None) -> None:
        """To be called behind each step; raises :class:`Cancelled` where all jobs of the batch are."""
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
        """Of the jobs that want one now, decoded by all ranks together."""
        total, wanted = self._batch[0]["settings"]["num_inference_steps"], []
        for row, job in enumerate(self._batch):
            if job["preview_every"] and done % job["preview_every"] == 0 and done < total:
                wanted.append(row)
        pictures = preview(self._pipe, latents[wanted], self._batch[0]["settings"]) if wanted else []
        return {self._batch[row]["id"]: encoded(picture) for row, picture in zip(wanted, pictures, strict=False)}


def preview(pipe: Any, latents: torch.Tensor, settings: dict[str, Any]) -> list[Image.Image]:
    """Latents decoded at half their height and width; empty for those that are no pictures ``[B, C, H, W]``."""
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
    """A picture as PNG, a video as MP4 (GIF without an encoder), latents as safetensors."""
    if isinstance(item, Image.Image):
        file = io.BytesIO()
        item.save(file, "PNG", compress_level=1)
        return file.getvalue()
    with tempfile.TemporaryDirectory() as folder, open(write_media(item, folder, "result"), "rb") as file:
        return file.read()


def _takes(pipe: Any) -> Any:
    return inspect.signature(type(pipe).__call__).parameters
