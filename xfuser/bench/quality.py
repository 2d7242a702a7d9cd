"""Similarity of images: PSNR, SSIM, and FID between two folders."""

import math
import os
import pickle
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from PIL import Image

from xfuser.core.extras import extra

PICTURES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
FID_SIDE = 299  # pixels, the input size of the Inception network


def psnr(a: torch.Tensor, b: torch.Tensor, peak: float = 1.0) -> float:
    """Peak signal-to-noise ratio in decibels, at most 120; ``a`` and ``b`` have the same shape, in 0..``peak``."""
    return -10 * math.log10((a.double() - b.double()).square().mean().item() / peak**2 + 1e-12)


def ssim(a: torch.Tensor, b: torch.Tensor) -> float:
    """Structural similarity of images ``[N, C, H, W]`` in 0..1, at least 11 pixels a side; 1 for equal images.

    Wang et al., Image Quality Assessment, 2004; Gaussian window of 11 pixels. Single precision is 15 times as fast as
    double; on flat areas, the error may be 1e-4. Raises a ValueError without torchmetrics.
    """
    metrics = extra("torchmetrics.functional.image", "SSIM")
    return metrics.structural_similarity_index_measure(a.float(), b.float(), data_range=1.0).item()


def fid(one: str | list[str], other: str | list[str], features: str, batch: int = 32) -> float:
    """Fréchet distance between the features of two sets of images (arXiv 1706.08500).

    Args:
        one, other: folders, or lists of files; images are scaled to 299 x 299 pixels.
        features: file of the network, as TorchScript or a module saved by ``torch.save`` (loading the latter runs code
            from the file). The network takes uint8 images ``[N, 3, 299, 299]`` and returns ``[N, D]``.

    Raises:
        ValueError: there are fewer than two images, the file has no such network, or torchmetrics is not installed.
    """
    metrics = extra("torchmetrics.image.fid", "FID")
    files = [_pictures(given) for given in (one, other)]
    distance = metrics.FrechetInceptionDistance(feature=_network(features))
    for paths, real in zip(files, (True, False), strict=True):
        for pixels in _batches(paths, batch):
            distance.update(pixels, real=real)
    return distance.compute().item()


def _pictures(given: str | list[str]) -> list[str]:
    """The image files of a list, or of a folder in the order of their names."""
    if isinstance(given, str):
        if not os.path.isdir(given):
            raise ValueError(f"{given!r} is not a folder")
        paths = [os.path.join(given, name) for name in sorted(os.listdir(given)) if name.lower().endswith(PICTURES)]
    else:
        paths = [path for path in given if path.lower().endswith(PICTURES)]
    if len(paths) < 2:
        where = repr(given) if isinstance(given, str) else "what was drawn"
        raise ValueError(f"{where} has {len(paths)} images ({', '.join(PICTURES)}); FID requires at least two")
    return paths


def _network(path: str) -> torch.nn.Module:
    if not os.path.isfile(path):
        raise ValueError(f"features={path!r} is not a file: give the file of a network (see docs/fid.md)")
    try:
        try:
            network: Any = torch.jit.load(path, map_location="cpu")
        except RuntimeError:
            network = torch.load(path, map_location="cpu", weights_only=False)
    except (RuntimeError, pickle.UnpicklingError, AttributeError, ImportError) as error:
        raise ValueError(f"features={path!r} holds no network that can be loaded: {error}") from error
    if not isinstance(network, torch.nn.Module):
        raise ValueError(f"features={path!r} holds a {type(network).__name__}, but it must be a module")
    return network.eval()


def _batches(paths: list[str], size: int) -> Iterator[torch.Tensor]:
    for start in range(0, len(paths), size):
        yield torch.stack([_pixels(path) for path in paths[start : start + size]])


def _pixels(path: str) -> torch.Tensor:
    picture = Image.open(path).convert("RGB").resize((FID_SIDE, FID_SIDE), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(picture).copy()).permute(2, 0, 1)
