"""What PipeFusion's stages did when, during one call."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from xfuser.core.meters import Waiting
from xfuser.methods.pipefusion.stage import Stage

Span = dict[str, float]  # stage, step, patch, start, end: a sub-step on one stage, in seconds of the machine's clock


@contextmanager
def timeline(waits: Waiting) -> Iterator[list[Span]]:
    """Record the sub-steps of a PipeFusion call within the context, each from when its tokens were there."""
    spans: list[Span] = []
    computed = Stage.computed

    def spanned(stage: Stage, call: Any, arguments: Any) -> Any:
        start, before = time.perf_counter(), len(waits.waits)
        output = computed(stage, call, arguments)
        if stage._rank > 0:
            start = waits.waits[before][1]  # when the previous stage's tokens were there
        place = {"stage": stage._rank, "step": stage._clock.step, "patch": stage._clock.patch}
        spans.append(place | {"start": start, "end": time.perf_counter()})
        return output

    with mock.patch.object(Stage, "computed", spanned):
        yield spans
