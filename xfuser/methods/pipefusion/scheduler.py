"""A stand-in for a pipeline's scheduler that leads the pipeline's loop through the patches of every step."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from xfuser.call import CallState
from xfuser.core.distributed import GroupCoordinator
from xfuser.core.hooks import Binder
from xfuser.methods.pipefusion.channel import Channel
from xfuser.methods.pipefusion.patches import Patches


class PatchwiseScheduler:
    """Steps the patches of the latents one after the other, each with a copy of the real scheduler.

    ``timesteps`` names each timestep once for every patch, and ``order`` is as many times higher: what pipelines make
    of schedulers that evaluate the model several times a step. All else is the real scheduler's: of the copy whose
    patch comes next. Made by :func:`patchwise`, as an instance of the real scheduler's class, too.

    Every stage steps, so that random numbers are drawn alike everywhere; only the last stage's latents count.
    """

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__") or name in _OWN or name in object.__getattribute__(self, "__dict__"):
            return object.__getattribute__(self, name)
        return getattr(self._copies[self._call.patch], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN or name in self.__dict__:
            object.__setattr__(self, name, value)
        else:
            setattr(self._copies[self._call.patch], name, value)

    @property
    def timesteps(self) -> torch.Tensor:
        return self._copies[0].timesteps.repeat_interleave(self._call.patches)

    @property
    def _step_index(self) -> int:
        raise ValueError(
            "PipeFusion does not serve a pipeline that turns its scheduler back to step twice: use Ulysses, ring, CFG"
            " or data parallelism"
        )

    @property
    def order(self) -> int:
        return self._copies[0].order * self._call.patches

    @property
    def sigmas(self) -> torch.Tensor:
        """As the timesteps, from the first sub-step's end on: pipelines look them up by the number of the sub-step."""
        real = self._copies[self._call.patch].sigmas
        return real.repeat_interleave(self._call.patches) if self._begun else real

    @sigmas.setter
    def sigmas(self, value: torch.Tensor) -> None:
        self._copies[self._call.patch].sigmas = value

    def set_begin_index(self, begin_index: int = 0) -> None:
        if hasattr(self._copies[0], "set_begin_index"):
            self._copies[0].set_begin_index(begin_index // self._call.patches)

    def scale_model_input(self, sample: torch.Tensor, timestep: Any = None) -> torch.Tensor:
        """Scales what the next sub-step computes, and once: some pipelines keep the result as their latents."""
        self._begin(timestep)
        patch = self._call.patch
        if self._call.synchronous and patch == 0:
            return self._copies[0].scale_model_input(sample, timestep)
        rows = self._patches.rows(sample, patch)
        scaled = self._copies[patch].scale_model_input(self._patches.rows_of(sample, rows), timestep)
        return sample if self._call.synchronous else self._placed(scaled, rows, sample)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        raise ValueError(
            "PipeFusion does not serve pipelines that copy their scheduler, as for further latents or single frames:"
            " use other methods"
        )

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        real = self._copies[0]
        self._copies, self._results, self._begun = [real], [], False
        real.set_timesteps(*args, **kwargs)
        self._call.announce(len(real.timesteps), real.order)

    def _begin(self, timestep: Any) -> None:
        """Ahead of the first sub-step: all that the pipeline sets has been set."""
        if self._begun:
            return
        real = self._copies[0]
        first = getattr(real, "begin_index", None)
        if first is None and timestep is not None:
            first = next((i for i, t in enumerate(real.timesteps.tolist()) if t == float(timestep)), 0)
        if not self._call.steps:  # the schedule was made before this stand-in was there
            self._call.announce(len(real.timesteps), real.order)
        self._call.begin(len(real.timesteps) - (first or 0))
        self._copies = [real, *(copy.deepcopy(real) for _ in range(self._call.patches - 1))]
        self._begun = True

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self._bind(args, kwargs)
        sample = arguments["sample"]
        self._begin(arguments["timestep"])
        patch = self._call.patch
        rows = self._patches.rows(sample, patch)
        dim = self._patches.dim(sample)

        def has_rows(x: Any) -> bool:
            """Also of times for each token."""
            return (
                isinstance(x, torch.Tensor)
                and x.dim() > 1
                and self._patches.dim(x) == dim
                and x.shape[dim] == sample.shape[dim]
            )

        if patch == 0:
            self._first = arguments
        elif sample.dtype != self._first["sample"].dtype:  # of the results: rows that have not stepped were cast
            arguments["sample"] = self._first["sample"]
        # What pipelines say of the step before is of the sub-step before: with the first patch, that is the same.
        arguments = {
            name: x if has_rows(self._first.get(name)) else self._first.get(name) for name, x in arguments.items()
        }
        arguments = {name: self._patches.rows_of(x, rows) if has_rows(x) else x for name, x in arguments.items()}
        with self._noise.of_patch(patch, rows, sample):
            parts, tree = tree_flatten(self._copies[patch].step(**arguments))
        self._results = [self._whole(index, part, rows, sample) for index, part in enumerate(parts)]
        self._end_substep([x for x in self._results if isinstance(x, torch.Tensor)])
        return tree_unflatten(self._results, tree)

    def _whole(self, index: int, part: Any, rows: range, sample: torch.Tensor) -> Any:
        """A part of the step's result, for all rows: the next sample; others as the patches last left them."""
        if not isinstance(part, torch.Tensor) or part.dim() != sample.dim():
            return part
        return self._placed(part, rows, self._results[index] if index and self._results else sample)

    def _placed(self, part: torch.Tensor, rows: range, whole: torch.Tensor) -> torch.Tensor:
        """A copy of ``whole``, in the dtype of ``part``, with these rows replaced."""
        result = whole.to(part.dtype, copy=True)
        self._patches.rows_of(result, rows).copy_(part)
        return result


_OWN = frozenset(name for name in vars(PatchwiseScheduler) if not name.startswith("__"))


def patchwise(
    scheduler: Any, call: CallState, patches: Patches, end_substep: Callable[[list[torch.Tensor]], None]
) -> Any:
    """A stand-in for ``scheduler``; ``end_substep`` is given the tensors of each sub-step's result, to be completed.

    Raises:
        ValueError: the scheduler's steps need the whole latents.
    """
    _check(scheduler)
    kind = type(scheduler)
    stand_in = object.__new__(type(kind.__name__, (PatchwiseScheduler, kind), {}))
    vars(stand_in).update(
        _copies=[scheduler],
        _first={},
        _results=[],
        _begun=False,
        _call=call,
        _patches=patches,
        _end_substep=end_substep,
        _bind=Binder(scheduler.step),
        _noise=_WholeNoise(patches),
    )
    # Pipelines look at the signatures of these.
    vars(stand_in)["step"] = wraps(scheduler.step)(partial(stand_in._step))
    vars(stand_in)["set_timesteps"] = wraps(scheduler.set_timesteps)(partial(stand_in._set_timesteps))
    return stand_in


def _check(scheduler: Any) -> None:
    name = type(scheduler).__name__
    if hasattr(scheduler, "noise_sampler"):
        raise ValueError(
            f"PipeFusion does not serve {name}, whose noise is one Brownian path of the whole latents: use another"
            " scheduler, such as DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++'"
        )
    if scheduler.config.get("thresholding"):
        raise ValueError(
            f"PipeFusion does not serve thresholding=True of {name}, a quantile of the whole latents: switch it off, or"
            " use another method"
        )


class _WholeNoise(TorchFunctionMode):
    """Noise within a step is drawn for the whole latents, with the first patch, and each patch gets its rows."""

    def __init__(self, patches: Patches) -> None:
        super().__init__()
        self._patches = patches
        self._drawn: list[torch.Tensor] = []

    @contextmanager
    def of_patch(self, patch: int, rows: range, sample: torch.Tensor) -> Iterator[None]:
        """Within the context, ``torch.randn`` and its like give the rows of a patch of latents like ``sample``."""
        if patch == 0:
            self._drawn = []
        self._index, self._patch, self._rows = 0, patch, rows
        self._dim = self._patches.dim(sample)
        self._length = sample.shape[self._dim]
        with self:
            yield

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.randn, torch.rand):
            size = kwargs.pop("size", None) or (args if isinstance(args[0], int) else args[0])
            return self._draw(lambda whole: func(whole, **kwargs), size)
        if func in (torch.randn_like, torch.rand_like):
            x = kwargs.pop("input", None) if not args else args[0]
            return self._draw(lambda whole: func(x.new_empty(whole), **kwargs), x.shape)
        return func(*args, **kwargs)

    def _draw(self, draw: Callable[[list[int]], torch.Tensor], size: Any) -> torch.Tensor:
        size = list(size)
        of_patch = len(size) > self._dim + 1 and size[self._dim] == len(self._rows)
        if of_patch:
            size[self._dim] = self._length
        if self._patch == 0:
            self._drawn.append(draw(size))
        noise = self._drawn[self._index]
        self._index += 1
        return self._patches.rows_of(noise, self._rows) if of_patch else noise


class Latents:
    """The way of the latents from the last stage, which steps them, back to the first one, which embeds them."""

    def __init__(self, group: GroupCoordinator, channel: Channel | None, call: CallState, patches: Patches) -> None:
        self._group, self._channel, self._call, self._patches = group, channel, call, patches

    def pass_on(self, results: list[torch.Tensor]) -> None:
        """At the end of a sub-step: send what it renewed, and receive what the next one needs.

        ``results`` are the step's tensors, whole, the next latents first; they are completed in place.
        """
        call = self._call
        ends_whole = call.ends_whole(call.step)
        if ends_whole and call.ends_step:
            for x in results:
                x.copy_(self._group.broadcast(x, src=self._group.world_size - 1))
        if self._channel is None:
            return
        latents = results[0]
        if self._group.is_last_rank and not ends_whole:
            self._channel.send([self._rows(latents, call.patch)])
        if self._group.is_first_rank:
            self._receive(latents)

    def _receive(self, latents: torch.Tensor) -> None:
        """On the first stage: the next sub-step's rows, if they come singly."""
        coming = self._call.after(self._call.step, self._call.patch)
        if coming is None or not self._single(coming):
            return
        rows = self._rows(latents, coming[1])
        (received,) = self._channel.receive([rows.numel()], latents)
        rows.copy_(received.view(rows.shape))
        following = self._call.after(*coming)
        if following and self._single(following):
            self._channel.expect([self._rows(latents, following[1]).numel()], latents)

    def _single(self, substep: tuple[int, int]) -> bool:
        """Whether a sub-step's latents, which are of the step before, travel patch by patch."""
        return not self._call.ends_whole(substep[0] - 1)

    def _rows(self, latents: torch.Tensor, patch: int) -> torch.Tensor:
        return self._patches.rows_of(latents, self._patches.rows(latents, patch))
