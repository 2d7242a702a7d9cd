"""The bench of PipeFusion: a real pipeline's loop on two stages, its asynchronous steps timed patch by patch."""

import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import diffusers
import torch
import torch.distributed as dist

from xfuser.bench.cases import pixart
from xfuser.bench.meters import traffic
from xfuser.config import EngineConfig, ModelConfig, ParallelConfig, RuntimeConfig
from xfuser.core.distributed import GroupCoordinator, destroy_distributed_environment
from xfuser.methods.pipefusion.channel import Channel
from xfuser.methods.pipefusion.stage import Stage
from xfuser.parallel import xDiTParallel

TITLE = "PipeFusion: PixArt, 4,096 tokens, hidden 512, 16 layers, 2 stages"
STEPS = 9  # one synchronous, eight asynchronous
PATCHES = (4, 8)


@dataclass
class Span:
    """One sub-step on one stage, from when its tokens were there: seconds of the machine's clock."""

    stage: int
    step: int
    patch: int
    start: float
    end: float


@dataclass
class Timeline:
    """What a stage did when, during one call."""

    spans: list[Span] = field(default_factory=list)
    waits: list[tuple[float, float]] = field(default_factory=list)

    def waiting(self, start: float, end: float) -> float:
        """Seconds of waiting between two moments."""
        return sum(max(0.0, min(b, end) - max(a, start)) for a, b in self.waits)


@contextmanager
def timeline() -> Iterator[Timeline]:
    """Record the sub-steps of a PipeFusion call within the context, and its waiting for other ranks."""
    record = Timeline()
    computed = Stage.computed

    def spanned(stage: Stage, call: Any, arguments: Any) -> Any:
        start = time.perf_counter()
        before = len(record.waits)
        output = computed(stage, call, arguments)
        if stage._rank > 0:
            start = record.waits[before][1]  # when the previous stage's tokens were there
        clock = stage._clock
        record.spans.append(Span(stage._rank, clock.step, clock.patch, start, time.perf_counter()))
        return output

    def timed(original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return original(*args, **kwargs)
            finally:
                record.waits.append((start, time.perf_counter()))

        return call

    with (
        mock.patch.object(Stage, "computed", spanned),
        mock.patch.object(Channel, "receive", timed(Channel.receive)),
        mock.patch.object(Channel, "send", timed(Channel.send)),
        mock.patch.object(GroupCoordinator, "broadcast", timed(GroupCoordinator.broadcast)),
    ):
        yield record


def run_pipeline(rank: int, rounds: int, store: str, picture: str | None) -> None:
    """One rank's part; rank 0 prints the table, and draws the timeline of M = 4 where a file is named."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=2)
    beside = _serial_step()
    alone = _serial_step() if rank == 0 else None
    dist.barrier()
    rows = []
    for patches in PATCHES:
        measured = [_pass(patches) for _ in range(rounds)]
        rows.append((patches, measured))
    if rank == 0:
        _print(alone, beside, rows)
        if picture:
            draw(rows[0][1][-1]["spans"], picture)
    destroy_distributed_environment()
    dist.destroy_process_group()


def _pipe() -> Any:
    torch.manual_seed(0)
    pipe = diffusers.PixArtSigmaPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=pixart(16).eval(),
        scheduler=diffusers.DPMSolverMultistepScheduler(),
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _call(pipe: Any, steps: int) -> None:
    pipe(
        prompt_embeds=torch.randn(1, 32, 64, generator=torch.Generator().manual_seed(0)),
        prompt_attention_mask=torch.ones(1, 32),
        negative_prompt=None,
        guidance_scale=1.0,
        height=1024,
        width=1024,
        use_resolution_binning=False,
        num_inference_steps=steps,
        output_type="latent",
    )


def _serial_step() -> float:
    """Seconds of a step of the bare pipeline: the second one of two, as the first one warms up."""
    pipe, moments = _pipe(), []
    step = pipe.scheduler.step
    pipe.scheduler.step = lambda *args, **kwargs: (moments.append(time.perf_counter()), step(*args, **kwargs))[1]
    _call(pipe, 3)
    return (moments[-1] - moments[0]) / 2


def _pass(patches: int) -> dict[str, Any]:
    """One call on two stages: the asynchronous phase of each, from the end of the synchronous step."""
    parallel = ParallelConfig(pp_degree=2, num_pipeline_patch=patches)
    pipe = xDiTParallel(_pipe(), EngineConfig(ModelConfig(""), RuntimeConfig(torch.float32), parallel))
    with timeline() as record, traffic() as sent:
        dist.barrier()
        _call(pipe, STEPS)
    parameters = sum(weight.numel() for weight in pipe.transformer.parameters())
    told: list[Any] = [None, None]
    dist.all_gather_object(told, (record, sent.total, parameters))
    whole = sum(weight.numel() for weight in pipe.unwrap().transformer.parameters())
    spans = [span for one, *_ in told for span in one.spans]
    start = max(span.end for span in spans if span.step == 0)
    end = max(span.end for span in spans)
    return {
        "spans": spans,
        "seconds": (end - start) / (STEPS - 1),
        "waiting": [one.waiting(start, end) / (end - start) for one, *_ in told],
        "sent": [count for _, count, _ in told],
        "parameters": [count / whole for *_, count in told],
    }


def _print(alone: float, beside: float, rows: list[tuple[int, list[dict[str, Any]]]]) -> None:
    print(f"Serial step {alone:.2f} s alone, {beside:.2f} s beside another; {STEPS - 1} asynchronous steps.\n")
    print(
        "| patches | step | efficiency | speed-up | waiting, by stage | sent a step, by stage | parameters, by stage |"
    )
    print("|---|---|---|---|---|---|---|")
    for patches, measured in rows:
        seconds = statistics.median(one["seconds"] for one in measured)
        waiting = [statistics.median(values) for values in zip(*(one["waiting"] for one in measured), strict=True)]
        sent = measured[0]["sent"]
        print(
            f"| {patches} | {seconds:.2f} s | {beside / (2 * seconds):.2f} | {alone / seconds:.2f}"
            f" | {', '.join(f'{share:.1%}' for share in waiting)}"
            f" | {', '.join(f'{count / STEPS / 1e6:.1f} MB' for count in sent)}"
            f" | {', '.join(f'{share:.1%}' for share in measured[0]['parameters'])} |"
        )
    print(flush=True)


COLOURS = ("#4e79a7", "#f28e2b", "#59a14f", "#e15759", "#b07aa1", "#76b7b2", "#edc948", "#9c755f")


def draw(spans: list[Span], path: str, steps: int = 4) -> None:
    """Draw the first steps of a run: a band for each stage, time from left to right, a colour for each patch."""
    from PIL import Image, ImageDraw, ImageFont

    spans = [span for span in spans if span.step < steps]
    start, end = min(span.start for span in spans), max(span.end for span in spans)
    width, left, band = 1100, 70, 44
    stages = 1 + max(span.stage for span in spans)
    image = Image.new("RGB", (width + left + 10, stages * band + 60), "white")
    brush, font = ImageDraw.Draw(image), ImageFont.load_default(14)

    def x(moment: float) -> float:
        return left + (moment - start) / (end - start) * width

    for stage in range(stages):
        brush.text((8, stage * band + 22), f"stage {stage}", fill="black", font=font)
    for span in spans:
        top = span.stage * band + 10
        colour = "#bbbbbb" if span.step == 0 else COLOURS[span.patch % len(COLOURS)]
        brush.rectangle((x(span.start), top, x(span.end), top + band - 6), fill=colour, outline="white")
        label = "whole image" if span.step == 0 else f"{span.step}.{span.patch}"
        if x(span.end) - x(span.start) > 26:
            brush.text((x(span.start) + 5, top + 11), label, fill="white", font=font)
    bottom = stages * band + 14
    brush.line((left, bottom, left + width, bottom), fill="black")
    for second in range(0, int(end - start) + 1, 5):
        brush.line((x(start + second), bottom, x(start + second), bottom + 5), fill="black")
        brush.text((x(start + second) - 8, bottom + 8), f"{second} s", fill="black", font=font)
    image.save(path)
