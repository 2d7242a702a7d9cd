"""``xdit quality``: compare the images of configurations with those of a serial run, prompt by prompt."""

import argparse
import os
import re
import statistics
import sys
from pathlib import Path
from typing import Any

from xfuser.bench.command import base_arguments, is_rank, of_this_world, run_ranks
from xfuser.bench.configurations import Configuration, configurations
from xfuser.bench.files import write_json, write_text
from xfuser.config import FlexibleArgumentParser, xFuserArgs
from xfuser.config.args import shipped_folder
from xfuser.core.distributed.failure import fail_together
from xfuser.core.extras import extra
from xfuser.pipeline_io.media import check_writable
from xfuser.testing.shapes import scenes
from xfuser.testing.shapes.check import check

PROMPTS = [  # prompts for the shipped pipeline
    "a red circle above a blue square",
    "a green triangle left of a yellow circle",
    "a blue square on a white background",
    "two red squares on a black background",
    "a yellow triangle below a purple circle",
    "a large green circle on a gray background",
    "a small red triangle right of a blue square",
    "three yellow circles on a gray background",
]
CONFIGS = [f"num_pipeline_patch={patches} warmup_steps={steps}" for patches in (2, 4, 8) for steps in (1, 4)]
SERIAL = "serial"


def main(arguments: list[str]) -> int:
    """Run the command; returns the exit code.

    Raises:
        ValueError: the options cannot be run; raised before any rank starts.
    """
    options = parser().parse_args(arguments)
    if options.fid:
        from xfuser.bench.quality import fid

        print(f"FID {fid(*options.fid, _features(options)):.4f}")
        return 0
    prompts = _prompts(options)
    chosen = configurations(options.configs or CONFIGS, options.ranks, base_arguments(options))
    if is_rank():
        fail_together()
        return _run_rank(options, of_this_world(chosen), prompts)
    if options.features:
        _features(options)
    check_writable(options.output_dir)
    extra("matplotlib", "a plot")
    told = run_ranks("quality", arguments, chosen)
    if told is None:
        return 1
    print(_write_report(options, prompts, told))
    return 0


def parser() -> FlexibleArgumentParser:
    """The flags of the command, and the library's flags for the pipeline and its inputs."""
    flags = FlexibleArgumentParser(
        prog="xdit quality",
        description="Generate images under configurations and serially; compare PSNR, SSIM, FID, and prompt adherence.",
        epilog='Example: xdit quality --configs "pipefusion_parallel_degree=2 num_pipeline_patch=4"',
    )
    flags.add_argument("--configs", nargs="+", metavar="FLAGS", help="As in xdit bench (default: PipeFusion previews).")
    flags.add_argument("--ranks", nargs="+", type=int, default=[2], help="Numbers of ranks for presets (default: 2).")
    flags.add_argument("--prompts", metavar="FILE", help="One prompt per line (default: the shipped pipeline's).")
    flags.add_argument("--fid", nargs=2, metavar="FOLDER", help="Only compute FID between two folders of images.")
    flags.add_argument("--features", metavar="FILE", help="Network for the features of FID (docs/fid.md).")
    flags.add_argument("--output_dir", default="results/quality", help="Folder for images and the report.")
    flags.add_argument("--part", help=argparse.SUPPRESS)  # file for rank 0's results, read by the parent process
    xFuserArgs.add_cli_args(flags).set_defaults(num_inference_steps=None)
    return flags


def _prompts(options: argparse.Namespace) -> list[str]:
    if options.prompts:
        try:
            lines = Path(options.prompts).read_text(encoding="utf-8").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise ValueError(f"prompts={options.prompts!r} cannot be read: {error}") from None
        found = [line.strip() for line in lines if line.strip()]
    else:
        found = options.prompt or (PROMPTS if shipped_folder(options.model) else [])
    if not found:
        raise ValueError("there is nothing to draw: give --prompts FILE, with one prompt per line")
    return found


def _features(options: argparse.Namespace) -> str:
    extra("torchmetrics.image.fid", "FID")
    if not options.features or not os.path.isfile(options.features):
        raise ValueError(
            f"features={options.features!r}: FID needs the file of a network, which is not part of this package"
            " and is never downloaded; see docs/fid.md for how to get it"
        )
    return options.features


def folder_of(name: str) -> str:
    """The name of a configuration's image folder."""
    return re.sub(r"[^\w.=-]+", "_", name)


def _run_rank(options: argparse.Namespace, chosen: list[Configuration], prompts: list[str]) -> int:
    """Run one rank: rank 0 generates serially, all ranks with each configuration; rank 0 compares and saves."""
    from xfuser.bench.workload import Workload, ours
    from xfuser.core.distributed import destroy_distributed_environment, get_world_group, init_distributed_environment

    init_distributed_environment()
    first = get_world_group().is_first_rank
    workload = Workload(base_arguments(options))
    drawn = {SERIAL: [workload.run(workload.pipe(), prompt, place) for place, prompt in enumerate(prompts) if first]}
    skipped: dict[str, float | None] = {}
    for configuration in chosen:
        uses, pictures = [], []
        with ours(workload, configuration).opened() as pipe:
            for place, prompt in enumerate(prompts):
                pictures.append(workload.run(pipe, prompt, place))
                uses.append(pipe.cache_use)
        if first:
            drawn[configuration.name] = pictures
            total = sum(use.computed + use.skipped for use in uses)
            skipped[configuration.name] = sum(use.skipped for use in uses) / total if total else None
    if first:
        told = {name: _compared(options.output_dir, name, drawn[name], drawn[SERIAL]) for name in drawn}
        told = {name: row | {"skipped": skipped.get(name)} for name, row in told.items()}
        if options.part:
            write_json(options.part, told)
        else:
            print(_write_report(options, prompts, [told]))
    destroy_distributed_environment()
    return 0


def _compared(directory: str, name: str, pictures: list[Any], serial: list[Any]) -> dict[str, list[Any]]:
    """Save the images; returns the path, PSNR, and SSIM of each."""
    from xfuser.bench.quality import psnr, ssim
    from xfuser.pipeline_io.media import write_media

    paths = [write_media(x[0], os.path.join(directory, folder_of(name)), f"{i:05}") for i, x in enumerate(pictures)]
    pairs = list(zip(pictures, serial, strict=True))
    told = {"paths": paths, "psnr": [psnr(a.float(), b.float()) for a, b in pairs]}
    try:
        return told | {"ssim": [ssim(_flat(a), _flat(b)) for a, b in pairs]}
    except ValueError as error:  # without torchmetrics, the other results are still useful
        print(f"SSIM is left out: {error}", file=sys.stderr)
        return told | {"ssim": None}


def _flat(x: Any) -> Any:
    """Images, or the frames of videos, as ``[N, C, H, W]``."""
    x = x.movedim(-1, -3) if x.shape[-3] not in (1, 3) else x
    return x.reshape(-1, *x.shape[-3:])


def _write_report(options: argparse.Namespace, prompts: list[str], told: list[dict[str, Any]]) -> str:
    from xfuser.bench.plots import draw_pictures
    from xfuser.bench.quality import fid
    from xfuser.bench.report import describe, describe_machine

    rows = {name: row for run in told for name, row in run.items()}
    checked = shipped_folder(options.model)
    for name, row in rows.items():
        row["adherence"] = _adherence(prompts, row["paths"]) if checked else None
        if options.features and name != SERIAL:
            row["fid"] = fid(rows[SERIAL]["paths"], row["paths"], options.features)
    machine = describe_machine()
    path = os.path.join(options.output_dir, "quality")
    write_json(f"{path}.json", {"machine": machine, "prompts": prompts, "rows": rows})
    count = f"{len(prompts)} prompts. PSNR and SSIM against serial: median, and lowest."
    text = "\n\n".join(["# Quality", describe(machine), count, _table(rows)]) + "\n"
    write_text(f"{path}.md", text)
    draw_pictures(f"{path}.png", prompts, rows)
    return text


def _adherence(prompts: list[str], paths: list[str]) -> float | None:
    """Share of images that show all of their prompts, among the prompts that the shipped pipeline's checker knows."""
    from PIL import Image

    verdicts = []
    for prompt, path in zip(prompts, paths, strict=True):
        try:
            scene = scenes.parse(prompt)
        except ValueError:  # has unknown words
            continue
        with Image.open(path) as picture:
            verdicts.append(all(check(picture, scene).values()))
    return statistics.mean(verdicts) if verdicts else None


def _table(rows: dict[str, dict[str, Any]]) -> str:
    lines = ["| configuration | skipped | PSNR | SSIM | as the prompt asks | FID |", "|---|---|---|---|---|---|"]
    for name, row in rows.items():
        asked = "" if row["adherence"] is None else f"{row['adherence']:.0%}"
        distance = f"{row['fid']:.3g}" if "fid" in row else ""
        shown = [_median(row[key], digits) if name != SERIAL else "" for key, digits in (("psnr", 1), ("ssim", 4))]
        skipped = "" if row["skipped"] is None else f"{row['skipped']:.0%}"
        lines.append(f"| `{name}` | {skipped} | {shown[0]} | {shown[1]} | {asked} | {distance} |")
    return "\n".join(lines)


def _median(values: list[float] | None, digits: int) -> str:
    return f"{statistics.median(values):.{digits}f} ({min(values):.{digits}f})" if values else ""
