"""What clients may send, by OpenAI's names and those of a Diffusers pipeline, and the jobs that it makes."""

import io
import math
import random
from dataclasses import dataclass, replace
from typing import Any, Literal

from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from xfuser.cli.words import check_words
from xfuser.config import InputConfig
from xfuser.pipeline_io.media import FRAMES_PER_SECOND
from xfuser.serve.jobs import Failure, Job

LONGEST_PROMPT, MOST_STEPS, SEEDS = 4000, 1000, 2**31
SETTINGS = ("num_inference_steps", "height", "width", "guidance_scale", "num_frames")


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


@dataclass
class Limits:
    """What this server draws.

    Attributes:
        model: the folder or name that the pipeline is loaded from; ``name``: that of clients.
        inputs: values for what a request does not say.
        side: the largest height or width in pixels.
        batch: the largest number of pictures in a call.
    """

    model: str
    name: str
    inputs: InputConfig
    side: int
    batch: int

    def jobs(self, request: Request, abilities: dict[str, Any], image: bytes | None = None) -> list[Job]:
        """A request as jobs, one for each picture, with seeds that count up.

        Raises:
            Failure: it asks for what this model does not draw.
        """
        if request.model not in (None, self.name):
            told = f"model={request.model!r} is not served here: it is {self.name!r}"
            raise Failure(404, told, "model_not_found", "model")
        if isinstance(request, VideoRequest) != abilities["videos"]:
            path = "/v1/videos" if abilities["videos"] else "/v1/images/generations"
            raise Failure(400, f"{abilities['pipeline']} does not draw this: POST {path}", "unsupported_endpoint")
        if image:
            check_picture(image)
            if not abilities["pictures"]:
                told = f"{abilities['pipeline']} takes no picture: remove it"
                raise Failure(400, told, "unsupported_endpoint", "image")
        settings = self._settings(request, abilities["multiple"])
        try:
            check_words(self.model, request.prompt, request.negative_prompt)
            replace(self.inputs, prompt=request.prompt, **settings).check()
        except ValueError as error:
            raise Failure(400, str(error), "invalid_value", "prompt") from error
        seed = random.randrange(SEEDS) if request.seed is None else request.seed
        previews = getattr(request, "partial_images", 0)
        every = math.ceil(settings["num_inference_steps"] / (previews + 1)) if previews else 0
        common = {"settings": settings, "image": image, "preview_every": every, "retry": request.retry}
        common |= {"prompt": request.prompt, "negative_prompt": request.negative_prompt, "most": self.batch}
        return [Job(seed=(seed + place) % 2**63, **common) for place in range(getattr(request, "n", 1))]

    def _settings(self, request: Request, multiple: int) -> dict[str, Any]:
        given = {name: getattr(request, name, None) for name in SETTINGS}
        if request.size not in (None, "auto"):
            given["width"], given["height"] = self._size(request.size, multiple)
        if getattr(request, "seconds", None) and not request.num_frames:
            given["num_frames"] = request.seconds * FRAMES_PER_SECOND + 1
        return {name: getattr(self.inputs, name) if value is None else value for name, value in given.items()}

    def _size(self, size: str, multiple: int) -> list[int]:
        sides = [int(side) if side.isdecimal() else 0 for side in size.split("x")]
        if len(sides) != 2 or not all(0 < side <= self.side and side % multiple == 0 for side in sides):
            allowed = f"WIDTHxHEIGHT, both multiples of {multiple} from {multiple} to {self.side}, such as"
            nearest = "x".join(str(max(multiple, min(side, self.side) // multiple * multiple)) for side in sides[:2])
            near = nearest if len(sides) == 2 else f"{16 * multiple}x{16 * multiple}"
            raise Failure(400, f"size={size!r} is not drawn: give {allowed} {near}", "invalid_value", "size")
        return sides
