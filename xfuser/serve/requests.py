"""What clients may send, by OpenAI's names and those of a Diffusers pipeline, and the jobs that it makes."""

import io
import math
import random
from dataclasses import replace
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from xfuser.cli.words import check_words
from xfuser.config import EngineConfig, InputConfig
from xfuser.pipeline_io.media import FRAMES_PER_SECOND
from xfuser.serve.jobs import Failure, Job

LONGEST_PROMPT, MOST_STEPS, SEEDS = 4000, 1000, 2**31


class Request(BaseModel):
    """What pictures and videos have in common."""

    model_config = ConfigDict(extra="forbid")

    prompt: str = Field(min_length=1, max_length=LONGEST_PROMPT)
    model: str | None = None
    size: str | None = Field(None, max_length=20)
    user: str | None = None
    seed: int | None = Field(None, ge=0, lt=2**63)
    negative_prompt: str = Field("", max_length=LONGEST_PROMPT)
    num_inference_steps: int | None = Field(None, ge=1, le=MOST_STEPS)
    guidance_scale: float | None = Field(None, allow_inf_nan=False)
    retry: bool = False


class ImageRequest(Request):
    """``POST /v1/images/generations``; ``/v1/images/edits`` has the picture besides."""

    n: int = Field(1, ge=1, le=10)
    response_format: Literal["b64_json", "url"] = "b64_json"
    stream: bool = False
    partial_images: int = Field(0, ge=0, le=20)


class VideoRequest(Request):
    """``POST /v1/videos``."""

    seconds: int | None = Field(None, ge=1, le=60)
    num_frames: int | None = Field(None, ge=1, le=60 * FRAMES_PER_SECOND)


def check_picture(data: bytes) -> None:
    """Raise a :class:`Failure` for what is no picture."""
    try:
        with Image.open(io.BytesIO(data)) as picture:
            picture.load()
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise Failure(400, f"the file is not a picture that can be read: {error}", "invalid_value", "image") from error


class Limits:
    """What this server draws.

    Args:
        inputs: values for what a request does not say.
        side: the largest height or width in pixels.
        batch: the largest batch.
    """

    def __init__(self, engine_config: EngineConfig, inputs: InputConfig, side: int, batch: int) -> None:
        self.model, self._inputs, self._side, self._batch = engine_config.model_config.model, inputs, side, batch

    def jobs(self, request: Request, abilities: dict[str, Any], name: str, image: bytes | None = None) -> list[Job]:
        """A request as jobs, one for each picture, with seeds that count up; ``name`` is the model's.

        Raises:
            Failure: it asks for what this model does not draw.
        """
        if request.model not in (None, name):
            raise Failure(
                404, f"model={request.model!r} is not served here: it is {name!r}", "model_not_found", "model"
            )
        videos = isinstance(request, VideoRequest)
        if videos != abilities["videos"]:
            path = "/v1/videos" if abilities["videos"] else "/v1/images/generations"
            raise Failure(400, f"{abilities['pipeline']} does not draw this: POST {path}", "unsupported_endpoint")
        if image and not abilities["pictures"]:
            raise Failure(400, f"{abilities['pipeline']} takes no picture: remove it", "unsupported_endpoint", "image")
        settings = self._settings(request, abilities["multiple"])
        try:
            check_words(self.model, request.prompt, request.negative_prompt)
            replace(self._inputs, prompt=request.prompt, **settings).check()
        except ValueError as error:
            raise Failure(400, str(error), "invalid_value", "prompt") from error
        seed = random.randrange(SEEDS) if request.seed is None else request.seed
        previews = getattr(request, "partial_images", 0)
        every = math.ceil(settings["num_inference_steps"] / (previews + 1)) if previews else 0
        common = {"settings": settings, "image": image, "preview_every": every, "retry": request.retry}
        common |= {"prompt": request.prompt, "negative_prompt": request.negative_prompt, "most": self._batch}
        return [Job(seed=(seed + place) % 2**63, **common) for place in range(getattr(request, "n", 1))]

    def _settings(self, request: Request, multiple: int) -> dict[str, Any]:
        settings = {"num_inference_steps": self._inputs.num_inference_steps}
        settings |= {"height": self._inputs.height, "width": self._inputs.width}
        settings |= {"guidance_scale": self._inputs.guidance_scale, "num_frames": self._inputs.num_frames}
        given = {name: getattr(request, name, None) for name in settings}
        if request.size not in (None, "auto"):
            given["width"], given["height"] = self._size(request.size, multiple)
        if getattr(request, "seconds", None) and not request.num_frames:
            given["num_frames"] = request.seconds * FRAMES_PER_SECOND + 1
        return settings | {name: value for name, value in given.items() if value is not None}

    def _size(self, size: str, multiple: int) -> list[int]:
        sides = [int(side) if side.isdecimal() else 0 for side in size.split("x")]
        if len(sides) != 2 or not all(0 < side <= self._side and side % multiple == 0 for side in sides):
            allowed = f"WIDTHxHEIGHT, both multiples of {multiple} from {multiple} to {self._side}, such as"
            nearest = "x".join(str(max(multiple, min(side, self._side) // multiple * multiple)) for side in sides[:2])
            near = nearest if len(sides) == 2 else f"{16 * multiple}x{16 * multiple}"
            raise Failure(400, f"size={size!r} is not drawn: give {allowed} {near}", "invalid_value", "size")
        return sides
