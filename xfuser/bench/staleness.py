"""What PipeFusion's staleness does to pictures of the shipped pipeline: ``python -m xfuser.bench.staleness``.

One process suffices: the result depends on the number of patches M and of synchronous steps W, not on stages.
"""

import argparse
import statistics
from typing import Any

import torch

from xfuser.bench.quality import psnr
from xfuser.config import xFuserArgs
from xfuser.loading import load_pipeline
from xfuser.parallel import xDiTParallel

PATCHES, WARMUPS = (2, 4, 8), (0, 1, 4)
PROMPTS = [
    "a red circle above a blue square",
    "a green triangle left of a yellow circle",
    "a blue square on a white background",
    "two red squares on a black background",
    "a yellow triangle below a purple circle",
    "a large green circle on a gray background",
    "a small red triangle right of a blue square",
    "three yellow circles on a gray background",
]


def pictures(patches: int, warmup: int) -> torch.Tensor:
    """One picture for each prompt, ``[N, 3, H, W]`` in 0..1, with 20 steps and seeds 0, 1, 2, ..."""
    args = xFuserArgs(num_pipeline_patch=patches, warmup_steps=warmup, prompt="-")
    engine, inputs = args.create_config()
    pipe = xDiTParallel(load_pipeline(engine, inputs), engine, inputs)
    pipe.set_progress_bar_config(disable=True)
    call = pipe.call_arguments() | {"output_type": "pt", "guidance_scale": 4.0}
    drawn = [
        pipe(**call | {"prompt": prompt, "generator": torch.Generator().manual_seed(seed)}).images
        for seed, prompt in enumerate(PROMPTS)
    ]
    pipe.unwrap()
    return torch.cat(drawn)


def main() -> None:
    flags = argparse.ArgumentParser(prog="python -m xfuser.bench.staleness", description=__doc__)
    flags.add_argument("--pictures", metavar="FILE", help="Write the pictures side by side into this file.")
    options = flags.parse_args()
    serial = pictures(1, 0)
    shown: list[tuple[str, torch.Tensor]] = [("serial", serial)]
    print(f"PSNR against serial in dB: median and lowest of {len(PROMPTS)} pictures, 20 steps\n")
    print("| | " + " | ".join(f"W = {warmup}" for warmup in WARMUPS) + " |")
    print("|---" * (len(WARMUPS) + 1) + "|")
    for patches in PATCHES:
        cells = []
        for warmup in WARMUPS:
            drawn = pictures(patches, warmup)
            values = [psnr(a, b) for a, b in zip(drawn, serial, strict=True)]
            cells.append(f"{statistics.median(values):.1f} ({min(values):.1f})")
            if warmup == 1:
                shown.append((f"M = {patches}, W = 1", drawn))
        print(f"| M = {patches} | " + " | ".join(cells) + " |", flush=True)
    if options.pictures:
        side_by_side(shown, options.pictures)


def side_by_side(rows: list[tuple[str, torch.Tensor]], path: str, columns: int = 5, size: int = 160) -> None:
    """A row of pictures for each way of drawing them."""
    from PIL import Image, ImageDraw, ImageFont

    label = 110
    sheet = Image.new("RGB", (label + columns * size, len(rows) * size), "white")
    brush, font = ImageDraw.Draw(sheet), ImageFont.load_default(15)
    for y, (name, images) in enumerate(rows):
        brush.text((8, y * size + size // 2 - 8), name, fill="black", font=font)
        for x, image in enumerate(images[:columns]):
            sheet.paste(_picture(image).resize((size - 4, size - 4)), (label + x * size, y * size + 2))
    sheet.save(path)


def _picture(image: torch.Tensor) -> Any:
    from PIL import Image

    return Image.fromarray((image.permute(1, 2, 0) * 255).round().to(torch.uint8).numpy())


if __name__ == "__main__":
    main()
