"""Measure how parallel methods change the images of the shipped pipelines, and fill in docs/quality.md.

python quality.py draw         # generates the missing images; can be stopped and resumed
python quality.py lossless     # measures the largest error of the methods that are exact by design
python quality.py page         # writes the tables and figures for all generated images

Methods that require several ranks run them on this machine.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import textwrap
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

from xfuser import xDiTParallel, xFuserArgs
from xfuser.bench.quality import psnr, ssim
from xfuser.testing.ranks import RankPool
from xfuser.testing.shapes.check import MEASURES, PLACES, check, features, frechet_distance, rates
from xfuser.testing.shapes.scenes import KINDS, SHIFTS, Scene, caption, render, sample_scene

ROOT = Path(__file__).parent.parent.parent
ASSETS, PAGE, IMAGES = ROOT / "xfuser" / "assets", ROOT / "docs" / "quality.md", ROOT / "docs" / "images"


def pipefusion(patches: int, warmup: int) -> dict[str, Any]:
    """Return the arguments of `xFuserArgs` for PipeFusion; one rank gives the same image as any number of stages."""
    return {"num_pipeline_patch": patches, "warmup_steps": warmup}


def distrifusion(ranks: int, warmup: int, mode: str = "corrected_async_gn") -> dict[str, Any]:
    """Return the arguments of `xFuserArgs` for DistriFusion."""
    return {"distrifusion_degree": ranks, "warmup_steps": warmup, "distrifusion_mode": mode}


PIPELINES = ("shapes-256", "shapes-256-flux")
SERIAL, JOB = "serial", 6  # images per job of the rank pool
METHODS: dict[str, dict[str, Any]] = {
    SERIAL: {},
    "PipeFusion M = 2, W = 1": pipefusion(2, 1),
    "PipeFusion M = 4, W = 1": pipefusion(4, 1),
    "PipeFusion M = 8, W = 1": pipefusion(8, 1),
    "PipeFusion M = 2, W = 4": pipefusion(2, 4),
    "PipeFusion M = 4, W = 4": pipefusion(4, 4),
    "PipeFusion M = 8, W = 4": pipefusion(8, 4),
    "DistriFusion N = 2, W = 1": distrifusion(2, 1),
    "DistriFusion N = 4, W = 1": distrifusion(4, 1),
    "DistriFusion N = 2, W = 4": distrifusion(2, 4),
    "DistriFusion N = 4, W = 4": distrifusion(4, 4),
    "DistriFusion N = 2, W = 1, no_sync": distrifusion(2, 1, "no_sync"),
    "DistriFusion N = 4, W = 1, no_sync": distrifusion(4, 1, "no_sync"),
    "DistriFusion N = 4, W = 4, no_sync": distrifusion(4, 4, "no_sync"),
    "naive patches, 2 rows": {"naive_patch_degree": 2, "split_scheme": "row"},
    "naive patches, 2 alternating": {"naive_patch_degree": 2, "split_scheme": "alternate"},
}
LOSSLESS: dict[str, dict[str, Any]] = {
    "Ulysses 2": {"ulysses_degree": 2},
    "ring 2": {"ring_degree": 2},
    "guidance (CFG) 2": {"use_cfg_parallel": True},
    "data 2": {"data_parallel_degree": 2},
    "parallel VAE, Ulysses 2": {"ulysses_degree": 2, "use_parallel_vae": True},
    "tensor 2": {"tensor_parallel_degree": 2},
    "DistriFusion 2, full_sync": distrifusion(2, 1, "full_sync"),
    "PipeFusion 2, W = all steps": {"pipefusion_parallel_degree": 2, "num_pipeline_patch": 4, "warmup_steps": "steps"},
}
# Packed latents have no columns to split, and the Flux pipeline runs without guidance.
REFUSED = {"shapes-256-flux": ("naive patches, 2 alternating", "guidance (CFG) 2")}


def prompts(count: int, seed: int = 1) -> list[Scene]:
    """Return scenes of each of `KINDS` in turn; none of the pairs was in the training data."""
    rng = np.random.default_rng(seed)
    return [sample_scene(rng, held_out=True, kind=KINDS[index % len(KINDS)]) for index in range(count)]


def true_pictures(count: int) -> list[Image.Image]:
    """Return an image of each of these scenes, rendered as in the training data, with random shifts."""
    rng = np.random.default_rng(0)
    return [render(scene, rng=rng) for scene in prompts(count)]


# ---- drawing -----------------------------------------------------------------------------------------------


def folder_of(args: argparse.Namespace, method: str) -> Path:
    """Return the folder of a method's images; it depends on the weights, the steps and the guidance scale."""
    weights = b"".join(path.read_bytes() for path in sorted((ASSETS / args.pipeline).rglob("*.safetensors")))
    made = f"{args.pipeline}-{zlib.crc32(weights):08x}-{args.steps}-{args.guidance}"
    return args.work / made / re.sub(r"\W+", "-", method)


def asked(args: argparse.Namespace, degrees: dict[str, Any]) -> xFuserArgs:
    """Return the arguments of a pipeline call under a method, except its prompt."""
    given = {"num_inference_steps": args.steps, "guidance_scale": args.guidance, "max_sequence_length": args.tokens}
    return xFuserArgs(model=str(ASSETS / args.pipeline), prompt="a", height=256, width=256, **given, **degrees)


def taken(args: argparse.Namespace, methods: Iterable[str]) -> list[str]:
    """Return the methods that the pipeline supports."""
    return [method for method in methods if method not in REFUSED.get(args.pipeline, ())]


def draw(args: argparse.Namespace) -> None:
    """Generate the missing images of each prompt under each method."""
    methods = taken(args, args.methods or METHODS)
    ranks = {method: asked(args, METHODS[method]).checked()[0].world_size for method in methods}
    pool = RankPool(max(ranks.values()))
    for method in methods:
        folder, count = folder_of(args, method), args.count * (len(KINDS) if method == SERIAL else 1)
        folder.mkdir(parents=True, exist_ok=True)
        missing = [index for index in range(count) if not (folder / f"{index}.png").exists()]
        for start in range(0, len(missing), JOB):
            pool.run(ranks[method], draw_some, args, METHODS[method], missing[start : start + JOB], folder)
        print(f"{args.pipeline}, {method}: {len(missing)} drawn", flush=True)
    pool.close()


@cache
def loaded(folder: str) -> Any:
    """Load the pipeline, once per process."""
    pipe = DiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def wrapped(args: argparse.Namespace, degrees: dict[str, Any]) -> tuple[xDiTParallel, dict[str, Any]]:
    """Return the pipeline wrapped with a method on this rank, and the arguments of a call."""
    engine, inputs = asked(args, degrees).create_config()
    pipe = xDiTParallel(loaded(engine.model_config.model), engine, inputs)
    return pipe, pipe.call_arguments()


def draw_some(args: argparse.Namespace, degrees: dict[str, Any], indices: list[int], folder: Path) -> None:
    """Generate some prompts on this rank; the first rank writes the images."""
    scenes, (pipe, call) = prompts(indices[-1] + 1), wrapped(args, degrees)
    for index in indices:
        call |= {"prompt": caption(scenes[index]), "generator": torch.Generator().manual_seed(index)}
        picture = pipe(**call).images[0]
        if torch.distributed.get_rank() == 0:
            picture.save(folder / f"{index}.png")
    pipe.unwrap()


def lossless(args: argparse.Namespace) -> None:
    """Write the largest error of each lossless method, on two ranks, relative to the largest pixel value."""
    pool, found = RankPool(2), {}
    expected = pool.run(1, draw_few, args, {})[0]
    for method in taken(args, LOSSLESS):
        degrees = {name: args.steps if value == "steps" else value for name, value in LOSSLESS[method].items()}
        found[method] = max(float(np.abs(one - expected).max()) for one in pool.run(2, draw_few, args, degrees))
        print(f"{method}: {found[method]:.1e}", flush=True)
    pool.close()
    (folder_of(args, SERIAL).parent / "lossless.json").write_text(json.dumps(found))


def draw_few(args: argparse.Namespace, degrees: dict[str, Any]) -> np.ndarray:
    """Generate one prompt of each kind on this rank, `[3, 256, 256, 3]` in 0..1."""
    pipe, call = wrapped(args, degrees)
    pictures = pipe(**call | {"prompt": [caption(scene) for scene in prompts(len(KINDS))], "output_type": "np"}).images
    pipe.unwrap()
    return pictures


# ---- the page ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Picture:
    """A generated image, and the checker's results for it."""

    image: Image.Image
    verdict: dict[str, bool]
    features: np.ndarray

    @property
    def pixels(self) -> torch.Tensor:
        """`[1, 3, H, W]` in 0..1."""
        return torch.from_numpy(np.asarray(self.image).copy()).permute(2, 0, 1)[None] / 255


def drawn(args: argparse.Namespace, method: str) -> list[Picture]:
    """Return the generated images of a method, from the first one up to the first gap."""
    return _pictures_in(folder_of(args, method))


@cache
def _pictures_in(folder: Path) -> list[Picture]:
    images = []
    while (path := folder / f"{len(images)}.png").exists():
        images.append(Image.open(path).convert("RGB"))
    scenes = prompts(len(images))
    return [Picture(image, check(image, scene), features(image)) for image, scene in zip(images, scenes, strict=True)]


def adherence_table(args: argparse.Namespace) -> list[str]:
    """Return the checker's results for serial images, per measure and kind of prompt."""
    verdicts = [picture.verdict for picture in drawn(args, SERIAL)]
    lines = ["| prompts | number | " + " | ".join((*MEASURES, "everything")) + " |"]
    lines.append("|---" * (len(MEASURES) + 3) + "|")
    groups = {kind: verdicts[index :: len(KINDS)] for index, kind in enumerate(KINDS)} | {"all": verdicts}
    for kind, found in groups.items():
        lines.append(
            f"| {kind} | {len(found)} | " + " | ".join(f"{value:.3f}" for value in rates(found).values()) + " |"
        )
    return lines


def methods_table(args: argparse.Namespace) -> list[str]:
    """Return a row for each method with images: how close they are to serial, and their own quality."""
    serial = drawn(args, SERIAL)
    true = np.stack([features(picture) for picture in true_pictures(len(serial))])
    scale = np.maximum(true.std(0), 0.05)

    def right(pictures: list[Picture]) -> str:
        return f"{rates([picture.verdict for picture in pictures])['everything']:.3f}"

    def distance(pictures: list[Picture]) -> str:
        seen = np.stack([picture.features for picture in pictures])
        return f"{frechet_distance(seen, true[: len(seen)], scale):.2f}"

    lines = [
        "| method | pictures | PSNR, median (lowest) | SSIM, mean (lowest) | elsewhere | everything right"
        " | distance to true |",
        "|---|---|---|---|---|---|---|",
        f"| serial | {len(serial)} | equal | equal | 0 | {right(serial)} | {distance(serial)} |",
    ]
    for method in METHODS:
        pictures = drawn(args, method)
        if method == SERIAL or len(pictures) < 2 * len(KINDS):
            continue
        others = serial[: len(pictures)]
        pairs = list(zip(pictures, others, strict=True))
        decibels, similar = ([measure(a.pixels, b.pixels) for a, b in pairs] for measure in (psnr, ssim))
        aside = [np.abs(a.features - b.features)[PLACES].max() > max(SHIFTS) / 2 for a, b in pairs]
        lines.append(
            f"| {method} | {len(pairs)} | {statistics.median(decibels):.1f} ({min(decibels):.1f})"
            f" | {np.mean(similar):.3f} ({min(similar):.3f}) | {np.mean(aside):.3f}"
            f" | {right(pictures)} (serial {right(others)}) | {distance(pictures)} (serial {distance(others)}) |"
        )
    return lines


def lossless_table(args: argparse.Namespace) -> list[str]:
    """Return a row for each lossless method with its largest error."""
    path = folder_of(args, SERIAL).parent / "lossless.json"
    found = json.loads(path.read_text()) if path.exists() else {}
    return ["| method | |", "|---|---|"] + [
        f"| {method} | equal, largest error of a pixel {error:.1e} |" for method, error in found.items()
    ]


def page(args: argparse.Namespace) -> None:
    """Update the tables between this pipeline's marks in the page, and its figures."""
    makers = {"adherence": adherence_table, "methods": methods_table, "lossless": lossless_table}
    tables = {name: "\n".join(make(args)) for name, make in makers.items()}
    text, end = PAGE.read_text(), "<!-- end -->"
    for name, table in tables.items():
        begin = f"<!-- {args.pipeline} {name} -->\n"
        before, found, rest = text.partition(begin)
        if found:
            text = f"{before}{begin}\n{table}\n\n{end}{rest.partition(end)[2]}"
    PAGE.write_text(text)
    side_by_side(args, IMAGES / f"quality_{args.pipeline}.png")
    grid(args, IMAGES / f"{args.pipeline}.png")


def side_by_side(args: argparse.Namespace, path: Path, columns: int = 6, size: int = 160) -> None:
    """Write a figure with a row of images for each method: the first prompts, of each kind in turn."""
    rows = {method: pictures for method in METHODS if len(pictures := drawn(args, method)) >= columns}
    label = 190
    sheet = Image.new("RGB", (label + columns * size, len(rows) * size), "white")
    brush, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for y, (method, pictures) in enumerate(rows.items()):
        brush.text((8, y * size + size // 2 - 24), method.replace(", ", ",\n"), fill="black", font=font)
        for x, picture in enumerate(pictures[:columns]):
            sheet.paste(picture.image.resize((size - 4, size - 4)), (label + x * size, y * size + 2))
    sheet.quantize(160).save(path)


def grid(args: argparse.Namespace, path: Path, columns: int = 6, rows: int = 4, size: int = 192) -> None:
    """Write a figure of the first serial images, each with its caption and the measures that are wrong."""
    sheet = Image.new("RGB", (columns * (size + 4), rows * (size + 42)), "white")
    pen, scenes = ImageDraw.Draw(sheet), prompts(columns * rows)
    for index, picture in enumerate(drawn(args, SERIAL)[: columns * rows]):
        x, y = index % columns * (size + 4), index // columns * (size + 42)
        sheet.paste(picture.image.resize((size, size)), (x, y))
        wrong = [name for name, right in picture.verdict.items() if not right]
        text = caption(scenes[index]) + (f" (wrong: {', '.join(wrong)})" if wrong else "")
        pen.text((x, y + size), textwrap.fill(text, 32), fill="red" if wrong else "black")
    sheet.quantize(160).save(path)


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    flags.add_argument("stage", choices=("draw", "lossless", "page"))
    flags.add_argument("--pipeline", nargs="+", default=PIPELINES, choices=PIPELINES, help="folders of xfuser/assets")
    flags.add_argument("--methods", nargs="+", choices=list(METHODS), help="methods to run (default: all)")
    flags.add_argument(
        "--count", type=int, default=201, help="prompts, of each kind in turn; three times as many for serial"
    )
    flags.add_argument("--steps", type=int, default=20)
    flags.add_argument("--guidance", type=float, default=3.5)
    flags.add_argument("--tokens", type=int, default=32, help="maximum prompt length in tokens")
    flags.add_argument("--work", type=Path, default=Path("/tmp/tiny_model/quality"), help="folder of the images")
    return flags


def main() -> None:
    asked_for = vars(parser().parse_args())
    torch.set_num_threads(1)
    for pipeline in asked_for["pipeline"]:
        args = argparse.Namespace(**asked_for | {"pipeline": pipeline})
        {"draw": draw, "lossless": lossless, "page": page}[args.stage](args)


if __name__ == "__main__":
    main()
