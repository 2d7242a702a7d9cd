"""Check how well an image matches its scene.

Run as a script, it prints how often the checker is right about true images and about images with one error.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from PIL import Image

from xfuser.testing.shapes.scenes import BACKGROUNDS, COLOURS, SHAPES, Group, Placed, Scene, draw, render, sample_scene

SIDE, CELL = 256, 4
GRID = SIDE // CELL
TEMPLATE, LEAST_OVERLAP = 64, 0.85
NAMES = (*COLOURS, *BACKGROUNDS)
PALETTE = np.array([*COLOURS.values(), *BACKGROUNDS.values()], np.float32)
OPPOSITES = {"above": "below", "below": "above", "left of": "right of", "right of": "left of", "and": "right of"}
PLACES = slice(-4, -2)  # index in the features: mean position of the objects, in fractions of the image's side
MEASURES = ("background", "colours", "count", "shapes", "relation")


@dataclass(frozen=True)
class Found:
    """An object detected in an image, with the closest shape; x and y are in pixels of a 256 x 256 image."""

    colour: str
    shape: str
    overlap: float
    aspect: float
    x: float
    y: float
    area: int


def label_pixels(picture: Image.Image) -> tuple[np.ndarray, np.ndarray]:
    """Return the index of the nearest named colour, and its distance, for each pixel of the image at 256 x 256."""
    pixels = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32)
    distances = np.stack([np.square(pixels - colour).sum(-1) for colour in PALETTE])
    return distances.argmin(0), distances.min(0)


def find_background(labels: np.ndarray) -> str:
    """Return the most frequent colour of the image's border."""
    rim = np.concatenate([labels[:8].ravel(), labels[-8:].ravel(), labels[:, :8].ravel(), labels[:, -8:].ravel()])
    return NAMES[np.bincount(rim, minlength=len(NAMES)).argmax()]


def find_objects(labels: np.ndarray, background: str) -> list[Found]:
    """Return the connected areas of one colour other than the background, without thin lines."""
    blocks = labels.reshape(GRID, CELL, GRID, CELL).transpose(0, 2, 1, 3).reshape(GRID, GRID, -1)
    found = []
    for index, name in enumerate(NAMES):
        if name == background:
            continue
        cells = (blocks == index).mean(-1) > 0.7
        for part in _connected_parts(cells):
            if _solid_cells(part) >= 4:
                found.append(_describe(labels == index, part, name))
    return found


def _connected_parts(cells: np.ndarray) -> list[np.ndarray]:
    left, parts = cells.copy(), []
    for start in zip(*np.nonzero(cells), strict=True):
        if not left[start]:
            continue
        part, todo = np.zeros_like(cells), [start]
        left[start] = False
        while todo:
            row, column = todo.pop()
            part[row, column] = True
            for near in ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1)):
                if 0 <= near[0] < GRID and 0 <= near[1] < GRID and left[near]:
                    left[near] = False
                    todo.append(near)
        parts.append(part)
    return parts


def _solid_cells(part: np.ndarray) -> int:
    windows = np.lib.stride_tricks.sliding_window_view(part, (3, 3))
    return int(windows.all((2, 3)).sum())


def _describe(mask: np.ndarray, part: np.ndarray, name: str) -> Found:
    """Measure the pixels of `mask` in the cells of `part` and their neighbours."""
    grown = np.lib.stride_tricks.sliding_window_view(np.pad(part, 1), (3, 3)).any((2, 3))
    inside = mask & np.kron(grown, np.ones((CELL, CELL), bool))
    ys, xs = np.nonzero(inside)
    box = inside[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    shape, overlap = match_shape(box)
    return Found(name, shape, overlap, box.shape[1] / box.shape[0], float(xs.mean()), float(ys.mean()), len(xs))


@lru_cache
def _template(shape: str) -> np.ndarray:
    picture = draw([Placed("red", shape, 0.5, 0.5, 1.0)], "white", TEMPLATE)
    return np.asarray(picture)[:, :, 1] < 142


def match_shape(mask: np.ndarray) -> tuple[str, float]:
    """Return the shape that best overlaps a mask cropped to its bounding box, and their intersection over union."""
    scaled = Image.fromarray(mask.astype(np.uint8) * 255).resize((TEMPLATE, TEMPLATE), Image.Resampling.BILINEAR)
    filled = np.asarray(scaled) > 127
    overlaps = {shape: float((filled & _template(shape)).sum() / (filled | _template(shape)).sum()) for shape in SHAPES}
    best = max(overlaps, key=overlaps.get)
    return best, overlaps[best]


def is_clean(item: Found) -> bool:
    """Return whether an object has the outline of its shape: about as wide as high, with a large overlap."""
    return 0.8 <= item.aspect <= 1.25 and item.overlap >= LEAST_OVERLAP


def check(picture: Image.Image, scene: Scene) -> dict[str, bool]:
    """Return for each of `MEASURES` whether the image is right.

    `colours`: the objects have exactly the named colours. `count`: each colour has its number of objects. `shapes`:
    the objects are exactly the named coloured shapes. `relation` is true if the scene has no relation.
    """
    labels, _ = label_pixels(picture)
    background = find_background(labels)
    objects = find_objects(labels, background)
    wanted = [(group.colour, group.shape) for group in scene.groups for _ in range(group.count)]
    return {
        "background": background == scene.background,
        "colours": {item.colour for item in objects} == {colour for colour, _ in wanted},
        "count": sorted(item.colour for item in objects) == sorted(colour for colour, _ in wanted),
        "shapes": sorted((item.colour, item.shape) for item in objects if is_clean(item)) == sorted(wanted),
        "relation": not scene.relation or _stand_as(objects, scene),
    }


def _stand_as(objects: list[Found], scene: Scene) -> bool:
    if len(objects) != 2:
        return False
    alike = objects[0].colour == objects[1].colour
    for first, second in itertools.permutations(objects):
        if not (_is(first, scene.groups[0], alike) and _is(second, scene.groups[1], alike)):
            continue
        x, y = second.x - first.x, second.y - first.y
        apart = {"above": y, "below": -y, "left of": x, "right of": -x, "and": x}[scene.relation]
        if apart > max(abs(x), abs(y)) - 1e-6:
            return True
    return False


def _is(item: Found, group: Group, alike: bool) -> bool:
    """Return whether this is the object of a group: by its colour, and by its shape if both have the same colour."""
    return item.colour == group.colour and (not alike or item.shape == group.shape)


def features(picture: Image.Image) -> np.ndarray:
    """Return the features of an image, independent of its prompt, for `frechet_distance`.

    They are the shares of the nine named colours, the share of pixels near none of them, the number of objects, and the
    objects' mean overlap with the closest shape, mean aspect, and mean and spread of the positions.
    """
    labels, distances = label_pixels(picture)
    objects = find_objects(labels, find_background(labels))
    shares = np.bincount(labels.ravel(), minlength=len(NAMES)) / labels.size
    rows = [(item.overlap, item.aspect, item.x / SIDE, item.y / SIDE) for item in objects] or [(0.0, 0.0, 0.5, 0.5)]
    spread = np.std(rows, axis=0)[2:]
    return np.concatenate([shares, [(distances > 48**2).mean(), len(objects)], np.mean(rows, axis=0), spread])


def frechet_distance(one: np.ndarray, other: np.ndarray, scale: np.ndarray) -> float:
    """Return the Fréchet distance of two sets of features `[n, d]`, each divided by `scale`, modelled as Gaussians.

    It is the formula of the FID (arXiv 1706.08500): |m1 - m2|^2 + tr(C1 + C2 - 2 (C1 C2)^(1/2)).
    """
    one, other = one / scale, other / scale
    covariances = [np.cov(features, rowvar=False) for features in (one, other)]
    roots = np.sqrt(np.linalg.eigvals(covariances[0] @ covariances[1]).astype(complex)).real
    return float(np.square(one.mean(0) - other.mean(0)).sum() + sum(np.trace(c) for c in covariances) - 2 * roots.sum())


def rates(verdicts: list[dict[str, bool]]) -> dict[str, float]:
    """Return the fraction of right verdicts for each measure, and for all measures together."""
    found = {name: float(np.mean([verdict[name] for verdict in verdicts])) for name in MEASURES}
    found["everything"] = float(np.mean([all(verdict.values()) for verdict in verdicts]))
    return found


def true_rates(count: int, seed: int) -> dict[str, float]:
    """Return how often the checker accepts true images, per measure."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    return rates([check(render(scene), scene) for scene in scenes])


def false_rates(count: int, seed: int) -> dict[str, float]:
    """Return how often the checker accepts images that are wrong in a measure, per measure."""
    rng, found = np.random.default_rng(seed), {}
    for name in MEASURES:
        scenes = [sample_scene(rng, kind="pair") for _ in range(count)]
        found[name] = float(np.mean([check(render(spoil(scene, name, rng)), scene)[name] for scene in scenes]))
    return found


def spoil(scene: Scene, measure: str, rng: np.random.Generator) -> Scene:
    """Make a pair wrong in one measure: change or remove the second object, or change the background or relation."""

    def other(values: Iterable[str], value: str) -> str:
        return str(rng.choice([one for one in values if one != value]))

    first, second = scene.groups
    if measure == "background":
        return replace(scene, background=other(BACKGROUNDS, scene.background))
    if measure == "count":
        return Scene((first,), background=scene.background)
    if measure == "relation":
        return replace(scene, relation=OPPOSITES[scene.relation])
    if measure == "colours":
        changed = replace(second, colour=other(set(COLOURS) - {first.colour}, second.colour))
    else:
        changed = replace(second, shape=other(SHAPES, second.shape))
    return replace(scene, groups=(first, changed))


def main() -> None:
    """Print how often the checker accepts true images and spoilt images."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    true, false = true_rates(args.count, args.seed), false_rates(args.count, args.seed)
    for name, rate in true.items():
        print(f"{name:12} {rate:.3f} right about true images, {false.get(name, float('nan')):.3f} about spoilt ones")


if __name__ == "__main__":
    main()
