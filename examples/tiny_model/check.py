"""Look at a picture of the little world and say what of its scene is right.

python check.py truth                  # how often the checker is right about true pictures
python check.py pipeline FOLDER        # how often a pipeline draws what its prompts ask for
"""

from __future__ import annotations

import argparse
import itertools
import time
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw
from scenes import BACKGROUNDS, COLOURS, SHAPES, Placed, Scene, caption, draw, parse, render, sample_scene

SIDE, CELL = 256, 4
GRID = SIDE // CELL
NAMES = (*COLOURS, *BACKGROUNDS)
PALETTE = np.array([*COLOURS.values(), *BACKGROUNDS.values()], np.float32)
MEASURES = ("background", "colours", "count", "shapes", "relation")


@dataclass(frozen=True)
class Found:
    """An object seen in a picture; places are in pixels of a 256 x 256 picture."""

    colour: str
    shape: str
    x: float
    y: float
    area: int


def label_pixels(picture: Image.Image) -> np.ndarray:
    """Return for each pixel of the picture, scaled to 256 x 256, the index of the nearest named colour."""
    pixels = np.asarray(picture.convert("RGB").resize((SIDE, SIDE), Image.Resampling.BILINEAR), np.float32)
    distances = [np.square(pixels - colour).sum(-1) for colour in PALETTE]
    return np.argmin(distances, axis=0)


def find_background(labels: np.ndarray) -> str:
    """Return the colour of most of the picture's rim."""
    rim = np.concatenate([labels[:8].ravel(), labels[-8:].ravel(), labels[:, :8].ravel(), labels[:, -8:].ravel()])
    return NAMES[np.bincount(rim, minlength=len(NAMES)).argmax()]


def find_objects(labels: np.ndarray, background: str) -> list[Found]:
    """Return the connected areas of one colour, other than the background, which are no mere lines."""
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
    """Measure the pixels of `mask` in the cells of `part` and in those around them."""
    grown = np.lib.stride_tricks.sliding_window_view(np.pad(part, 1), (3, 3)).any((2, 3))
    inside = mask & np.kron(grown, np.ones((CELL, CELL), bool))
    ys, xs = np.nonzero(inside)
    box = inside[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
    return Found(name, name_shape(box), float(xs.mean()), float(ys.mean()), len(xs))


@lru_cache
def _template(shape: str, side: int = 32) -> np.ndarray:
    picture = draw([Placed("red", shape, 0.5, 0.5, 1.0)], "white", side)
    return np.asarray(picture)[:, :, 1] < 142


def name_shape(mask: np.ndarray, least_overlap: float = 0.8) -> str:
    """Name the shape which a mask, cut to its bounding box, overlaps best; "" if it is none of them."""
    height, width = mask.shape
    if not 0.75 <= width / height <= 1.33:
        return ""
    scaled = np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize((32, 32), Image.Resampling.BILINEAR)) > 127
    overlaps = {}
    for shape in SHAPES:
        template = _template(shape)
        overlaps[shape] = (scaled & template).sum() / (scaled | template).sum()
    best = max(overlaps, key=overlaps.get)
    return best if overlaps[best] >= least_overlap else ""


def check(picture: Image.Image, scene: Scene) -> dict[str, bool]:
    """Say for each of `MEASURES` whether the picture is right about it.

    `colours` asks that the objects show exactly the colours named, `count` that each colour has its number of
    objects, and `shapes` that the objects are exactly the coloured shapes named. `relation` is true if the
    scene has none.
    """
    labels = label_pixels(picture)
    background = find_background(labels)
    objects = find_objects(labels, background)
    wanted = [(group.colour, group.shape) for group in scene.groups for _ in range(group.count)]
    return {
        "background": background == scene.background,
        "colours": {item.colour for item in objects} == {colour for colour, _ in wanted},
        "count": sorted(item.colour for item in objects) == sorted(colour for colour, _ in wanted),
        "shapes": sorted((item.colour, item.shape) for item in objects) == sorted(wanted),
        "relation": not scene.relation or _stand_as(objects, scene),
    }


def _stand_as(objects: list[Found], scene: Scene) -> bool:
    if len(objects) != 2:
        return False
    for first, second in itertools.permutations(objects):
        if (first.colour, second.colour) != (scene.groups[0].colour, scene.groups[1].colour):
            continue
        x, y = second.x - first.x, second.y - first.y
        apart = {"above": y, "below": -y, "left of": x, "right of": -x, "and": x}[scene.relation]
        if apart > max(abs(x), abs(y)) - 1e-6:
            return True
    return False


def true_rates(count: int, seed: int) -> dict[str, float]:
    """Return how often the checker calls true pictures right."""
    rng = np.random.default_rng(seed)
    scenes = [sample_scene(rng) for _ in range(count)]
    return _rates([check(render(scene, rng), scene) for scene in scenes])


def _rates(verdicts: list[dict[str, bool]]) -> dict[str, float]:
    rates = {name: float(np.mean([verdict[name] for verdict in verdicts])) for name in MEASURES}
    rates["background and colours"] = float(np.mean([v["background"] and v["colours"] for v in verdicts]))
    rates["everything"] = float(np.mean([all(verdict.values()) for verdict in verdicts]))
    return rates


def score_pipeline(args: argparse.Namespace) -> dict[str, float]:
    """Let a pipeline draw prompts, of which no pair was in its training, and return how often it is right."""
    import torch
    from diffusers import DiffusionPipeline

    torch.set_num_threads(1)
    pipeline = DiffusionPipeline.from_pretrained(args.folder)
    pipeline.set_progress_bar_config(disable=True)
    rng = np.random.default_rng(args.seed)
    scenes = [parse("a red circle above a blue square")]
    scenes += [sample_scene(rng, held_out=True) for _ in range(args.count - 1)]
    began, pictures = time.time(), []
    for index, scene in enumerate(scenes):
        drawn = pipeline(
            caption(scene),
            num_inference_steps=args.steps,
            guidance_scale=args.guidance,
            max_sequence_length=args.max_sequence_length,
            clean_caption=False,
            generator=torch.Generator().manual_seed(index),
        )
        pictures.append(drawn.images[0])
    print(f"{(time.time() - began) / len(scenes):.2f} seconds per picture")
    verdicts = [check(picture, scene) for picture, scene in zip(pictures, scenes, strict=True)]
    if args.grid:
        write_grid(args.grid, pictures[:24], [caption(scene) for scene in scenes], verdicts)
    return _rates(verdicts)


def write_grid(path: Path, pictures: list[Image.Image], captions: list[str], verdicts: list[dict[str, bool]]) -> None:
    """Write pictures, six a row, each with its caption and what is wrong with it."""
    rows = -(-len(pictures) // 6)
    grid = Image.new("RGB", (6 * (SIDE + 4), rows * (SIDE + 28)), "white")
    pen = ImageDraw.Draw(grid)
    for index, picture in enumerate(pictures):
        x, y = index % 6 * (SIDE + 4), index // 6 * (SIDE + 28)
        grid.paste(picture.resize((SIDE, SIDE)), (x, y))
        wrong = [name for name, right in verdicts[index].items() if not right]
        pen.text((x, y + SIDE), captions[index], fill="black")
        pen.text((x, y + SIDE + 12), "wrong: " + ", ".join(wrong) if wrong else "", fill="red")
    grid.save(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    truth, pipeline = commands.add_parser("truth"), commands.add_parser("pipeline")
    pipeline.add_argument("folder", type=Path)
    pipeline.add_argument("--steps", type=int, default=20)
    pipeline.add_argument("--guidance", type=float, default=4.5)
    pipeline.add_argument("--max-sequence-length", type=int, default=32)
    pipeline.add_argument("--grid", type=Path, help="write the first 24 pictures there")
    for command, count in ((truth, 1000), (pipeline, 200)):
        command.add_argument("--count", type=int, default=count)
        command.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    rates = true_rates(args.count, args.seed) if args.command == "truth" else score_pipeline(args)
    for name, rate in rates.items():
        print(f"{name:22} {rate:.3f}")


if __name__ == "__main__":
    main()
