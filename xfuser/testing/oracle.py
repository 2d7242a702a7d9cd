"""Reference semantics of the inexact methods, in one process, with a mechanism other than the engine's.

The pipeline's loop and scheduler are unchanged. Each call of the transformer becomes M forwards of the *whole* image;
forward m gives the rows of part m. The forwards differ in their key and value projections: in forward m, the
projections of other parts' tokens are replaced by those kept from the forward that owns these tokens, in this step or
the previous one. Under PipeFusion, text belongs to part 0; under DistriFusion, it is split as well. Naive patches hide
all other parts.
"""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from types import MethodType
from typing import Any
from unittest import mock

import torch
from torch import nn
from torch.utils._pytree import tree_map

from xfuser.core.hooks import Binder, replaced
from xfuser.models.plan import ModelPlan, blocks_of
from xfuser.models.registry import controlnets_of, plan_of, planned_models
from xfuser.testing.projections import OF_TEXT, bands, layout, projecting


def joined(outputs: list[Any], dim: int, own: list[slice]) -> Any:
    """Concatenate each forward's own part of the output tensors, in the structure of the outputs."""
    parts = [
        tree_map(lambda x, part=part: x.narrow(dim, part.start, part.stop - part.start), one)
        for one, part in zip(outputs, own, strict=True)
    ]
    return tree_map(lambda *x: torch.cat(x, dim=dim), *parts)


class Displaced:
    """The state of one loop: its position, and the projections kept from earlier forwards."""

    starts: tuple[int, ...] = ()  # steps where guidance begins or ends; synchronous steps begin again there

    def __init__(self, model: nn.Module, plan: ModelPlan, patches: int, warmup: int, order: int) -> None:
        self.model, self.plan, self.patches, self.synchronous = model, plan, patches, max(1, warmup * order)
        self.step = self.call = self.counted = 0
        self.first: int | None = None  # step of the first call of the model
        self.stepped: int | None = None  # rows that the scheduler steps; the other rows are condition images
        # Dimensions of the latents; whether condition images come first; tokens of packed frames.
        self.given, self.leads, self.frame = 0, False, 0
        self.ahead, self.pictures = [0], [slice(0, 0)]
        self.patch: int | None = None
        self.kept: dict[tuple[str, int], torch.Tensor] = {}

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The transformer's forward, part by part."""
        latents = args[0] if args else kwargs[self.plan.latents]
        latents = latents[0] if isinstance(latents, list) else latents
        dim, unit, self.width = layout(self.model, self.plan, latents)
        self.given, self.dim, self.unit = latents.dim(), dim, unit
        if self.frame:
            unit = self.width = self.frame
        total = latents.shape[dim] // unit
        self.tokens, count = total * self.width, self.stepped or total
        ahead = total - count if self.leads else 0
        text = kwargs.get(self.plan.text_first)
        self.ahead = [0] if text is None else text.sum(dim=1).tolist()  # tokens before the image, per batch entry
        rows = [slice(ahead + band.start, ahead + band.stop) for band in bands(count, self.patches)]
        self.pictures = [slice(0, ahead * self.width), slice((ahead + count) * self.width, self.tokens)]
        self.own = [slice(band.start * self.width, band.stop * self.width) for band in rows]
        self.first = self.step if self.first is None else self.first
        if self.step < max(one for one in (self.first, *self.starts) if one <= self.step) + self.synchronous:
            self.patch = None
            output = original(*args, **kwargs)
        else:
            outputs = []
            for patch in range(self.patches):
                self.patch = patch
                given = tree_map(lambda x: x, (args, kwargs))  # a forward may empty the lists passed to it
                outputs.append(original(*given[0], **given[1]))
            rows = [slice(0, ahead), *rows, slice(ahead + count, total)]
            scaled = [slice(band.start * unit, band.stop * unit) for band in rows]
            sound = outputs[0][1:] if self.plan.sound else None  # sound belongs to part 0
            outputs = outputs if sound is None else [one[:1] for one in outputs]
            output = joined([outputs[0], *outputs, outputs[0]], dim, scaled)
            output = output if sound is None else output + sound
        self.call += 1
        return output

    def find(self, sample: torch.Tensor) -> None:
        """Record the rows that the scheduler steps: the first ones of packed latents, the last ones of a video."""
        self.leads = sample.dim() == 5
        if self.given == sample.dim() == 3:
            self.stepped = sample.shape[self.plan.packed]
        elif self.leads and self.given == 3:
            self.stepped, self.frame = sample.shape[self.plan.frames], sample[0, 0, 0].numel()
        elif self.leads and self.given == 5 and self.dim == self.plan.frames:
            self.stepped = sample.shape[self.dim] // self.unit

    def control(self, transformer: "Displaced", original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Run a ControlNet part by part and return its residuals, each ``[B, tokens, C]``."""
        self.step, self.patch = transformer.step, None
        if self.counted != self.step:
            self.call, self.counted = 0, self.step
        if self.step < self.synchronous:
            output = original(*args, **kwargs)
        else:
            self.own, self.tokens, outputs = transformer.own, transformer.tokens, []
            self.pictures = transformer.pictures
            for patch in range(self.patches):
                self.patch = patch
                outputs.append(original(*args, **kwargs))
            output = joined(outputs, 1, self.own)
        self.call += 1
        return output

    def project(self, name: str, streams: tuple[str, ...], columns: slice, output: torch.Tensor) -> torch.Tensor:
        """Hook on a projection ``[B, tokens, C]``: keep own rows, and replace the others by kept ones."""
        key = (name, self.call)
        if self.patch is None:
            self.kept[key] = output.clone()
            return output
        kept, count = self.kept[key], output.shape[1]
        of_text = name.endswith(OF_TEXT) or "image" not in streams  # text only
        words = count - self.tokens
        ahead = self.ahead if words else [0]
        for row, new in enumerate(output):
            start = words if streams[0] == "text" else ahead[row % len(ahead)]
            image = range(start, start + (0 if of_text else self.tokens))
            own = list(image[self.own[self.patch]])
            if self.patch == 0:
                own += [i for i in range(count) if i not in image] + [i for part in self.pictures for i in image[part]]
            kept[row, own] = new[own]
        result = output.clone()
        result[..., columns] = kept[..., columns]
        return result


class PartByPart:
    """One loop with one forward per part of the tokens; a part runs through all blocks before the next one.

    Args:
        share: returns the image tokens of each part, given the number of tokens and the width of a row.
    """

    def __init__(self, pipe: Any, share: Callable[[int, int], list[torch.Tensor]]) -> None:
        self.model, self.share = pipe.transformer, share
        self.plan = plan_of(self.model)
        self.step = self.call = 0
        self.part: int | None = None  # None: the whole image in one forward

    def forward(self, original: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """The transformer's forward, part by part."""
        latents = args[0] if args else kwargs[self.plan.latents]
        dim, unit, width = layout(self.model, self.plan, latents)
        self.tokens = latents.shape[dim] // unit * width
        self.own, self.assembled = self.share(self.tokens, width), {}
        parts = [None] if self.waits() else range(len(self.own))
        for self.part in parts:
            output = original(*args, **kwargs)
        self.part = None
        self.call += 1
        return output

    def waits(self) -> bool:
        """Whether this step runs as on one rank."""
        return False

    def complete(self, module: nn.Module, args: tuple, output: Any) -> Any:
        """Hook on the head, or on the last block if there is no head: assemble the rows of all parts."""
        if self.part is None:
            return output
        if self.plan.head:
            return self._assemble(0, output, ("image",))
        streams = self.plan.outputs(self.plan.blocks[-1])
        if isinstance(output, torch.Tensor):
            return self._assemble(0, output, streams[0])
        return tuple(self._assemble(i, x, one) for i, (x, one) in enumerate(zip(output, streams, strict=True)))

    def _assemble(self, index: int, output: torch.Tensor, streams: tuple[str, ...]) -> torch.Tensor:
        whole = self.assembled.setdefault(index, torch.zeros_like(output))
        rows, computed = (x.movedim(self.plan.carrier_dim, 1) for x in (whole, output))
        own = self.rows(streams, rows.shape[1])
        rows[:, own] = computed[:, own]
        return whole

    def rows(self, streams: tuple[str, ...], count: int) -> torch.Tensor:
        """Rows of this part in a sequence of ``count`` tokens."""
        words = count - self.tokens * ("image" in streams)
        starts = {"text": self.tokens if streams[0] == "image" else 0, "image": words if streams[0] == "text" else 0}
        own = {"text": self.text(words), "image": self.own[self.part]}
        return torch.cat([own[stream] + starts[stream] for stream in streams])

    def text(self, words: int) -> torch.Tensor:
        """The text tokens that this part computes."""
        return torch.arange(words)


class Lagging(PartByPart):
    """DistriFusion: in asynchronous steps, projections of other parts' tokens are those of the previous step."""

    def __init__(self, pipe: Any, parts: int, warmup: int, renews: bool) -> None:
        super().__init__(pipe, lambda tokens, width: _ranges(tokens, parts))
        self.synchronous, self.renews, self.parts = max(1, warmup * pipe.scheduler.order), renews, parts
        self.kept: dict[tuple[str, int], torch.Tensor] = {}
        self.fresh: dict[tuple[str, int], torch.Tensor] = {}

    def waits(self) -> bool:
        """Whether the step is synchronous."""
        return self.step < self.synchronous

    def project(self, name: str, streams: tuple[str, ...], columns: slice, output: torch.Tensor) -> torch.Tensor:
        """Hook on a projection: return own rows, and stale rows of other parts."""
        key = (name, self.call)
        if self.part is None:
            self.fresh[key] = output.clone()
            return output
        if self.part == 0:
            if self.renews or key not in self.kept:
                self.kept[key] = self.fresh[key]
            self.fresh[key] = output.clone()
        if name.endswith(OF_TEXT):
            streams = ("text",)
        elif output.shape[1] == self.tokens:  # text has separate projections
            streams = ("image",)
        own = self.rows(streams, output.shape[1])
        self.fresh[key][:, own] = output[:, own]
        result = output.clone()
        result[..., columns] = self.kept[key][..., columns]
        result[:, own] = output[:, own]
        return result

    def text(self, words: int) -> torch.Tensor:
        """The text tokens that this part computes."""
        if words < self.parts or self.plan.whole:  # all parts hold it, and the first one provides its keys
            return torch.arange(words if self.part == 0 else 0)
        return _ranges(words, self.parts, longer_last=True)[self.part]


class Alone(PartByPart):
    """Naive patches: attention sees only the tokens of the own part, and all text."""

    def attend(self, original: Callable[..., torch.Tensor], q: Any, k: Any, v: Any, *args: Any, **kwargs: Any) -> Any:
        """Attend to the tokens of the own part and to all text."""
        words = None if self.part is None else k.shape[2] - self.tokens
        if words is None or words < 0:  # in the text encoder, or to text only
            return original(q, k, v, *args, **kwargs)
        seen = self.rows(next(iter(self.plan.attentions().values())).keys if words else ("image",), k.shape[2])
        return original(q, k[:, :, seen], v[:, :, seen], *args, **kwargs)


def _ranges(count: int, parts: int, longer_last: bool = False) -> list[torch.Tensor]:
    sizes = [band.stop - band.start for band in bands(count, parts)]
    return list(torch.arange(count).split(sizes[::-1] if longer_last else sizes))


@contextmanager
def distrifusion(pipe: Any, parts: int, warmup: int, renews: bool = True, cache: Any = None) -> Iterator[None]:
    """Within the context, an unwrapped pipeline has DistriFusion's semantics.

    ``renews`` is false for ``no_sync``; for ``cache``, see :func:`displaced`.
    """
    state = Lagging(pipe, parts, warmup, renews)
    skipping = cache.skipping(state) if cache else nullcontext()
    with projecting(state.model, state.plan, state), skipping, _whole_forward(pipe, state):
        yield


@contextmanager
def naive(pipe: Any, parts: int, scheme: str) -> Iterator[None]:
    """Within the context, an unwrapped pipeline generates its image in independent parts."""

    def share(tokens: int, width: int) -> list[torch.Tensor]:
        if scheme == "row" or (scheme == "alternate" and state.step % 2 == 0):
            return _ranges(tokens, parts)
        grid = torch.arange(tokens).view(-1, width)
        return [grid[:, columns].flatten() for columns in _ranges(width, parts)]

    state = Alone(pipe, share)
    attend = partial(state.attend, nn.functional.scaled_dot_product_attention)
    with mock.patch.object(nn.functional, "scaled_dot_product_attention", attend), _whole_forward(pipe, state):
        yield


@contextmanager
def displaced(pipe: Any, patches: int, warmup: int, cache: Any = None, starts: tuple[int, ...] = ()) -> Iterator[None]:
    """Within the context, an unwrapped pipeline has PipeFusion's semantics.

    ``cache`` (``cache_oracle.py``) may skip blocks; ``starts`` are the steps where guidance begins or ends.
    """
    with ExitStack() as stack:
        for model, plan in planned_models(pipe, piped=True).values():
            state = Displaced(model, plan, patches, warmup, pipe.scheduler.order)
            state.starts = starts
            for net, of_net in controlnets_of(pipe):
                control = Displaced(net, of_net, patches, warmup, pipe.scheduler.order)
                stack.enter_context(projecting(net, of_net, control))
                stack.enter_context(mock.patch.object(net, "forward", partial(control.control, state, net.forward)))
            skipping = cache.skipping(state) if cache else nullcontext()
            for context in (projecting(model, plan, state), skipping, _whole_forward(pipe, state)):
                stack.enter_context(context)
        yield


@contextmanager
def _whole_forward(pipe: Any, state: Displaced | PartByPart) -> Iterator[None]:
    """Within the context, the transformer runs the forward of ``state``, and ``state`` counts steps and calls."""
    model, plan, step = state.model, state.plan, pipe.scheduler.step
    original = model.forward

    def counted(own: Any, *args: Any, **kwargs: Any) -> Any:
        if own is not pipe.scheduler:  # a copy of the scheduler
            return of_class(own, *args, **kwargs)
        state.step, state.call = state.step + 1, 0
        if isinstance(state, Displaced):
            state.find(Binder(step)(args, kwargs)["sample"])
        return step(*args, **kwargs)

    of_class = counted.__wrapped__ = type(pipe.scheduler).step
    with ExitStack() as stack:
        stack.enter_context(replaced(model, "forward", partial(state.forward, original)))
        stack.enter_context(replaced(pipe.scheduler, "step", MethodType(counted, pipe.scheduler)))
        if isinstance(state, PartByPart):
            end = model.get_submodule(plan.head) if plan.head else blocks_of(model, plan)[-1].module
            stack.callback(end.register_forward_hook(state.complete).remove)
        yield
