"""A timeline of PipeFusion's stages during one call."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from xfuser.core import device as devices
from xfuser.core.meters import Waiting
from xfuser.methods.sequence import SequenceParallel

Span = dict[str, float]  # stage, step, patch, start, end: a sub-step on one stage, in seconds of the machine's clock


@contextmanager
def timeline(waits: Waiting) -> Iterator[list[Span]]:
    """Record the sub-steps of a PipeFusion call in the context, each from the arrival of its tokens.

    On an accelerator the host only issues them, at other times: nothing is recorded.
    """
    spans: list[Span] = []
    wrapper = SequenceParallel._wrapper

    def spanned(method: SequenceParallel, forward: Any, arguments: Any) -> Any:
        if method._pipefusion is None or devices.device_type() != "cpu":
            return wrapper(method, forward, arguments)
        start, before = time.perf_counter(), len(waits.waits)
        output = wrapper(method, forward, arguments)
        stage, call = method._stage.number, method._call
        if stage > 0:
            start = waits.waits[before][1]  # arrival of the previous stage's tokens
        place = {"stage": stage, "step": call.step, "patch": call.patch}
        spans.append(place | {"start": start, "end": time.perf_counter()})
        return output

    with mock.patch.object(SequenceParallel, "_wrapper", spanned):
        yield spans
