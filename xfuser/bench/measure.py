"""One rank's part of the bench: count once, then time in rounds.

A round has a serial call on all ranks at once (so that the machine is as busy as in a parallel run), one on rank 0
only, and one under each configuration.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist

from xfuser.bench.quality import psnr
from xfuser.bench.timeline import timeline
from xfuser.bench.workload import Contender, Workload, timed
from xfuser.core.distributed import get_world_group
from xfuser.core.hooks import Binder
from xfuser.core.meters import LiveMemory, traffic, waiting
from xfuser.models.plan import blocks_of
from xfuser.models.registry import planned_models


def measure(workload: Workload, contenders: list[Contender], rounds: int, warm_up: int) -> dict[str, Any]:
    """Measure on these ranks; returns the same results on each of them, for ``xfuser.bench.report``."""
    with workload.serial() as pipe, _shape(pipe) as shape:
        serial, expected = _count(workload, pipe, None)
    told = {"ranks": dist.get_world_size(), "shape": shape, "serial": of_all_ranks(serial), "rows": []}
    running = []
    for contender in contenders:
        say(f"counting {contender.name}")
        row = {"name": contender.name} | _counted(workload, contender, expected)
        told["rows"].append(row)
        if "refused" not in row:
            running.append((contender, row))
    beside, alone = [], []
    for turn in range(rounds):
        say(f"round {turn + 1} of {rounds}")
        for times, runs in ((beside, True), (alone, get_world_group().is_first_rank)):
            with workload.serial() as pipe:
                times.append(_seconds(lambda pipe=pipe, runs=runs: workload.run(pipe) if runs else None))
        for contender, row in running:
            _time(workload, contender, row, warm_up)
    told["serial"] |= {"beside": beside, "seconds": alone}
    return told


def say(text: str) -> None:
    """Report progress to the user, on rank 0."""
    if get_world_group().is_first_rank:
        print(f"{dist.get_world_size()} ranks: {text}", file=sys.stderr, flush=True)


def _seconds(action: Any) -> float:
    start, end = timed(action)
    return end - start


def _counted(workload: Workload, contender: Contender, expected: torch.Tensor) -> dict[str, Any]:
    """The counters of a configuration by rank, or why it is refused if the pipeline or model does not support it."""
    opened = ExitStack()
    try:
        pipe = opened.enter_context(contender.opened())
    except ValueError as error:  # raised when wrapping, on all ranks alike
        return {"refused": str(error)}
    with opened:
        counted, _ = _count(workload, pipe, expected)
    return of_all_ranks(counted) | {"seconds": [], "waiting": []}


def _time(workload: Workload, contender: Contender, row: dict[str, Any], warm_up: int) -> None:
    with contender.opened() as pipe:
        for _ in range(warm_up):
            workload.run(pipe, **_short(workload.call()))
        with waiting() as waits, timeline(waits) as spans:
            start, end = timed(lambda: workload.run(pipe))
    told = of_all_ranks({"share": waits.between(start, end) / (end - start), "spans": spans})
    row["seconds"].append(end - start)
    row["waiting"].append(told["share"])
    row["spans"] = [span for one in told["spans"] for span in one]  # of the last round


def _short(call: dict[str, Any], steps: int = 2) -> dict[str, Any]:
    """Changes for a call of few steps, which opens connections and fills caches."""
    return {"num_inference_steps": min(steps, call["num_inference_steps"])}


def _count(workload: Workload, pipe: Any, expected: torch.Tensor | None) -> tuple[dict[str, Any], torch.Tensor]:
    """Counters of one call, and its output."""
    steps = workload.call()["num_inference_steps"]
    watch = _Steps(steps)
    with traffic() as sent, watch.watching(pipe):
        output = workload.run(pipe)
    weights = [weight for model, _ in planned_models(pipe).values() for weight in model.parameters()]
    counted = {
        "steps": steps,
        "sent": {name: count / steps for name, count in sent.sent.items()},
        "parameters": sum(map(_bytes, weights)),
        "live": watch.memory.peak,
        "buffers": watch.buffers,
    }
    return counted | (errors(output, expected) if expected is not None else {}), output


def _bytes(weight: torch.Tensor) -> int:
    local = weight.to_local() if hasattr(weight, "to_local") else weight  # of a sharded tensor, this rank's shard
    return 0 if local.is_meta else local.nbytes


def errors(output: torch.Tensor, expected: torch.Tensor) -> dict[str, float]:
    """Errors against serial; the peak of PSNR is 1 for images, and the range of values for latents."""
    far = (output.float() - expected.float()).abs().max().item()
    low, high = expected.min().item(), expected.max().item()
    peak = 1.0 if low >= 0 and high <= 1 else high - low
    relative = far / expected.abs().max().item()
    return {"max_error": far, "relative_error": relative, "psnr": psnr(output.float(), expected.float(), peak)}


class _Steps:
    """Watches the forwards of a pipeline's transformers for bytes that outlive a step."""

    def __init__(self, steps: int) -> None:
        self.memory = LiveMemory()
        self._steps, self._alive = steps, []

    @property
    def buffers(self) -> int:
        """Bytes alive at the start of a forward that forwards of the previous step or earlier ones allocated.

        The minimum over all steps except the first two: what threads of finished collectives still hold varies.
        """
        per_step = max(1, len(self._alive) // self._steps)
        old = [
            sum(size for epoch, size in alive.items() if epoch <= number - per_step)
            for number, alive in enumerate(self._alive)
        ]
        return min(old[2 * per_step :] or old[-1:])

    @contextmanager
    def watching(self, pipe: Any) -> Iterator[None]:
        models = [model for model, _ in planned_models(pipe).values()]
        handles = [model.register_forward_pre_hook(self._begin) for model in models]
        handles += [model.register_forward_hook(self._end) for model in models]
        with self.memory:
            yield
        for handle in handles:
            handle.remove()

    def _begin(self, model: Any, args: tuple) -> None:
        self.memory.epoch = len(self._alive)
        self._alive.append(self.memory.by_epoch())

    def _end(self, model: Any, args: tuple, output: Any) -> None:
        self.memory.epoch = None
        self.memory.free_of_epoch(output)  # the pipeline may keep the output, which is not a buffer


@contextmanager
def _shape(pipe: Any) -> Iterator[dict[str, int]]:
    """Sizes of the first block's streams, over all batch entries; empty if the blocks are unknown."""
    shape: dict[str, int] = {}

    def look(block: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        given = Binder(block.forward)(args, kwargs)
        streams = [given[name] for name in (plan.image, plan.text) if name and given.get(name) is not None]
        hidden = streams[0].shape[-1]
        shape["tokens"] = sum(stream.numel() // hidden for stream in streams)
        shape["hidden"], shape["element"] = hidden, streams[0].element_size()
        shape["layers"] = len(blocks_of(model, plan))

    model, plan = next(iter(planned_models(pipe).values()))
    handles = [one.module.register_forward_pre_hook(look, with_kwargs=True) for one in blocks_of(model, plan)[:1]]
    yield shape
    for handle in handles:
        handle.remove()


def of_all_ranks(values: dict[str, Any]) -> dict[str, list[Any]]:
    """All-gather each value to a list by rank."""
    told: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(told, values)
    return {name: [one[name] for one in told] for name in values}
