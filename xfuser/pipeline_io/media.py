"""Write images, videos and latents to files."""

import io
import os
import re
import tempfile
from collections.abc import Callable
from typing import Any

import numpy as np
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from xfuser.core.logger import logger

FRAMES_PER_SECOND = 16


def media_of(output: Any) -> list[Any]:
    """One entry per image or video of an output: PIL images, arrays ``[H, W, C]``, lists of frames, or tensors.

    Modular pipelines return the outputs requested by name: a single output, several in a dict, or their whole state.
    """
    for name in ("images", "frames", "videos"):
        found = output.get(name) if isinstance(output, dict) else getattr(output, name, None)
        if found is not None:
            return list(found)
    return list(output[0] if isinstance(output, tuple) else output)


def png(image: Image.Image) -> bytes:
    """Encode an image as PNG, for speed rather than size."""
    file = io.BytesIO()
    image.save(file, "PNG", compress_level=1)
    return file.getvalue()


def check_writable(directory: str) -> None:
    """Raise a ValueError if files cannot be written to a folder, which need not exist and is not created."""
    nearest = os.path.abspath(directory)
    while not os.path.lexists(nearest):
        nearest = os.path.dirname(nearest)
    try:
        with tempfile.TemporaryFile(dir=nearest):
            pass
    except OSError as error:
        raise ValueError(f"{directory!r} is not a folder that can be written to ({error}): name another one") from error


def write_media(item: Any, directory: str, name: str) -> str:
    """Write one image, video or latent into ``directory``, created if needed; returns the path.

    Characters of ``name`` that are unsafe in file names become ``_``. No incomplete file is left.
    """
    os.makedirs(directory, exist_ok=True)
    path = os.path.join(directory, re.sub(r"[^\w.-]+", "_", name).lstrip("."))
    if isinstance(item, Tensor) and not _looks_like_images(item):
        latents = {"latents": item.detach().cpu().contiguous()}
        return write_whole(f"{path}.safetensors", lambda unfinished: save_file(latents, unfinished))
    frames = _frames(item)
    if len(frames) == 1:
        return write_whole(f"{path}.png", frames[0].save)
    return _write_video(frames, path)


def write_whole(path: str, write: Callable[[str], Any]) -> str:
    """Let ``write`` create a temporary file, and rename it to ``path`` once complete; returns the path."""
    folder, name = os.path.split(path)
    unfinished = os.path.join(folder, f".{os.getpid()}_{name}")
    try:
        write(unfinished)
        os.replace(unfinished, path)
    finally:
        if os.path.exists(unfinished):
            os.unlink(unfinished)
    return path


def _looks_like_images(x: Tensor) -> bool:
    """Whether a tensor is ``[C, H, W]`` or ``[F, C, H, W]`` in [0, 1] with 1 or 3 channels, as ``pt`` output is."""
    return x.dim() in (3, 4) and x.shape[-3] in (1, 3) and float(x.min()) >= 0 and float(x.max()) <= 1


def _frames(item: Any) -> list[Image.Image]:
    if isinstance(item, Image.Image):
        return [item]
    if isinstance(item, Tensor):
        item = item.detach().float().cpu().movedim(-3, -1).numpy()
    if isinstance(item, np.ndarray):
        item = list(item[None] if item.ndim == 3 else item)
    return [frame if isinstance(frame, Image.Image) else _image(frame) for frame in item]


def _image(array: np.ndarray) -> Image.Image:
    pixels = (array * 255).round().clip(0, 255).astype(np.uint8) if array.dtype != np.uint8 else array
    return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels)


def _write_video(frames: list[Image.Image], path: str) -> str:
    try:
        from diffusers.utils import export_to_video

        return write_whole(f"{path}.mp4", lambda unfinished: export_to_video(frames, unfinished, fps=FRAMES_PER_SECOND))
    except (AttributeError, ImportError, OSError) as error:  # Diffusers raises AttributeError without ffmpeg
        logger.info("no video encoder (%s): writing a GIF", error)
    delay = 1000 // FRAMES_PER_SECOND
    options = {"save_all": True, "append_images": frames[1:], "duration": delay, "loop": 0}
    return write_whole(f"{path}.gif", lambda unfinished: frames[0].save(unfinished, **options))
