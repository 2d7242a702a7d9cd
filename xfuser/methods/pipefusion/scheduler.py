"""A stand-in for a pipeline's scheduler that makes the pipeline loop over the patches of every step."""

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_flatten, tree_unflatten

from xfuser.call import CallState
from xfuser.core.hooks import Binder
from xfuser.methods.pipefusion.patches import Patches
from xfuser.methods.pipefusion.refusals import refuse

EndSubstep = Callable[[list[Tensor], Tensor], None]  # completes a step's results in place; also gets its sample
EndSound = Callable[[Tensor, int, int], None]  # completes latents of sound in place; also gets step and patch


class PatchwiseScheduler:
    """Steps the patches of the latents one after the other, each with a copy of the real scheduler.

    ``timesteps`` repeats each timestep for every patch, and ``order`` is multiplied by the number of patches: pipelines
    see a scheduler that evaluates the model several times a step. All other attributes are those of the real scheduler,
    of the copy for the next patch. :func:`patchwise` creates it as an instance of the real scheduler's class, too.

    Every stage steps, so that all draw the same random numbers; only the last stage's latents are used.
    """

    def __init__(
        self, scheduler: Any, call: CallState, patches: Patches, end_substep: EndSubstep, boundary: float | None,
        end_sound: EndSound | None,
    ) -> None:  # fmt: skip
        own = vars(self)
        own.update(_copies=[scheduler], _first={}, _results=[], _begun=False)
        own.update(_end_substep=end_substep, _end_sound=end_sound)
        own.update(
            _call=call, _patches=patches, _boundary=boundary, _bind=Binder(scheduler.step), _noise=_FullNoise(patches)
        )
        # Pipelines inspect the signatures of these.
        own["step"] = wraps(scheduler.step)(partial(self._step))
        own["set_timesteps"] = wraps(scheduler.set_timesteps)(partial(self._set_timesteps))

    def __getattribute__(self, name: str) -> Any:
        if name.startswith("__") or name in _OWN or name in object.__getattribute__(self, "__dict__"):
            return object.__getattribute__(self, name)
        return getattr(self._copies[self._call.patch], name)

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OWN or name in self.__dict__:
            object.__setattr__(self, name, value)
        else:
            setattr(self._copies[self._call.patch], name, value)

    def __deepcopy__(self, memo: dict[int, Any]) -> Any:
        if self._end_sound is None:
            refuse("pipelines that copy their scheduler", "the copy, as for single frames, does not step patches")
        return stand_in(SoundScheduler, copy.deepcopy(self._copies[0], memo), self._call, self._end_sound)

    @property
    def timesteps(self) -> Tensor:
        """The timesteps of the scheduler, each repeated for every patch."""
        return self._copies[0].timesteps.repeat_interleave(self._call.patches)

    @property
    def _step_index(self) -> int:
        refuse("pipelines that turn their scheduler back to step twice", "each patch has its own scheduler")

    @property
    def order(self) -> int:
        """Evaluations per step, counting each patch."""
        return self._copies[0].order * self._call.patches

    @property
    def sigmas(self) -> Tensor:
        """Repeated like the timesteps from the first sub-step on, as pipelines index them by sub-step."""
        real = self._copies[self._call.patch].sigmas
        return real.repeat_interleave(self._call.patches) if self._begun else real

    @sigmas.setter
    def sigmas(self, value: Tensor) -> None:
        self._copies[self._call.patch].sigmas = value

    def set_begin_index(self, begin_index: int = 0) -> None:
        """Begin at the step that the sub-step ``begin_index`` belongs to."""
        if hasattr(self._copies[0], "set_begin_index"):
            self._copies[0].set_begin_index(begin_index // self._call.patches)

    def scale_model_input(self, sample: Tensor, timestep: Any = None) -> Tensor:
        """Scale the input of the next sub-step, and only once: some pipelines keep the result as their latents."""
        self._begin(timestep)
        patch = self._call.patch
        if not hasattr(self._copies[0], "scale_model_input"):  # pipelines check this with hasattr()
            return sample
        if self._call.synchronous:
            return sample if patch else self._copies[0].scale_model_input(sample, timestep)
        return self._placed(self._copies[patch].scale_model_input(self._patches.of(sample, patch), timestep), sample)

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        real = self._copies[0]
        self._copies, self._results, self._begun = [real], [], False
        real.set_timesteps(*args, **kwargs)
        self._call.announce(len(real.timesteps), real.order)

    def _begin(self, timestep: Any) -> None:
        """Before the first sub-step, when the pipeline has set all attributes: make a copy for each patch."""
        if self._begun:
            return
        real = self._copies[0]
        first = getattr(real, "begin_index", None)
        if first is None and timestep is not None:
            first = int((real.timesteps == timestep).int().argmax())  # the host reads one number
        if not self._call.steps:  # the schedule was made before this stand-in existed
            self._call.announce(len(real.timesteps), real.order)
        self._call.begin(len(real.timesteps) - (first or 0))
        if self._boundary is not None:
            self._call.start(int((real.timesteps[first or 0 :] >= self._boundary).sum()))
        self._copies = [real, *(copy.deepcopy(real) for _ in range(self._call.patches - 1))]
        self._begun = True

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        arguments = self._bind(args, kwargs)
        sample, patch = arguments["sample"], self._call.patch
        self._begin(arguments["timestep"])
        dim = self._patches.dim(sample)

        def has_rows(x: Any) -> bool:
            """True for times of each token, too."""
            divided = isinstance(x, Tensor) and x.dim() > 1 and self._patches.dim(x) == dim
            return divided and x.shape[dim] == sample.shape[dim]

        if patch == 0:
            self._first = arguments
        elif sample.dtype != self._first["sample"].dtype:  # rows not yet stepped were cast to the results'
            arguments["sample"] = self._first["sample"]
        # Arguments without rows are those of the first patch: pipelines pass values of the previous sub-step, which
        # there are those of the previous step.
        first = self._first
        arguments = {name: x if has_rows(first.get(name)) else first.get(name) for name, x in arguments.items()}
        arguments = {name: self._patches.of(x, patch) if has_rows(x) else x for name, x in arguments.items()}
        with self._noise.of_patch(patch, sample):
            parts, tree = tree_flatten(self._copies[patch].step(**arguments))
        self._results = [self._full(index, part, sample) for index, part in enumerate(parts)]
        self._end_substep([x for x in self._results if isinstance(x, Tensor)], sample)
        waits = self._call.synchronous and not self._call.ends_step
        return tree_unflatten([sample, *self._results[1:]] if waits else self._results, tree)

    def _full(self, index: int, part: Any, sample: Tensor) -> Any:
        """Complete a part of the step's result to all rows: with the sample, or with what earlier sub-steps computed.

        In a synchronous step the pipeline keeps the old sample until all patches have stepped: what it computes from
        the whole sample and prediction must be the same for each patch.
        """
        if not isinstance(part, Tensor) or part.dim() != sample.dim():
            return part
        left = self._results and (index or (self._call.synchronous and self._call.patch))
        return self._placed(part, self._results[index] if left else sample)

    def _placed(self, part: Tensor, full: Tensor) -> Tensor:
        """A copy of ``full``, in the dtype of ``part``, with this patch replaced."""
        result = full.to(part.dtype, copy=True)
        self._patches.of(result, self._call.patch).copy_(part)
        return result


_OWN = frozenset(name for name in vars(PatchwiseScheduler) if not name.startswith("__"))


class SoundScheduler(PatchwiseScheduler):
    """The copy of a :class:`PatchwiseScheduler` for sound: steps all latents of the sound with the first patch.

    It counts sub-steps itself, as the pipeline may step the video first, which advances the call's state.
    """

    def __init__(self, scheduler: Any, call: CallState, end_sound: EndSound) -> None:
        super().__init__(scheduler, call, None, None, None, end_sound)
        vars(self).update(_copies=[scheduler] * call.patches, _tree=None, _count=0)

    def _set_timesteps(self, *args: Any, **kwargs: Any) -> None:
        self._count, self._begun = 0, False
        self._copies[0].set_timesteps(*args, **kwargs)

    def _step(self, *args: Any, **kwargs: Any) -> Any:
        step, patch = divmod(self._count, self._call.patches)
        self._count, self._begun = self._count + 1, True
        if patch == 0:
            self._results, self._tree = tree_flatten(self._copies[0].step(*args, **kwargs))
        self._end_sound(self._results[0], step, patch)
        return tree_unflatten(self._results, self._tree)


def stand_in(cls: type, scheduler: Any, *args: Any) -> Any:
    """Create a ``cls`` for the scheduler that is an instance of the scheduler's class, too."""
    kind = type(scheduler)
    return type(kind.__name__, (cls, kind), {})(scheduler, *args)


def patchwise(
    scheduler: Any, call: CallState, patches: Patches, end_substep: EndSubstep, boundary: float | None = None,
    end_sound: EndSound | None = None,
) -> Any:  # fmt: skip
    """Create a stand-in for ``scheduler`` that is an instance of its class, too.

    ``boundary`` is the timestep below which the pipeline calls another transformer, if it does. With ``end_sound``, the
    pipeline may copy the stand-in for sound.

    Raises:
        ValueError: the scheduler's steps require the full latents.
    """
    kind = type(scheduler)
    if hasattr(scheduler, "noise_sampler"):
        other = "Use another scheduler, such as DPMSolverMultistepScheduler with algorithm_type='sde-dpmsolver++'"
        refuse(kind.__name__, "its noise is one Brownian path of the full latents", other)
    if scheduler.config.get("prediction_type") == "trigflow":
        refuse(kind.__name__, "pipelines leave out its last timestep by index, and here indices count sub-steps")
    if scheduler.config.get("thresholding"):
        refuse(f"thresholding=True of {kind.__name__}", "it is a quantile of the full latents", "Remove it")
    return stand_in(PatchwiseScheduler, scheduler, call, patches, end_substep, boundary, end_sound)


class _FullNoise(TorchFunctionMode):
    """Draws the noise of a step for the full latents, with the first patch; each patch gets its rows."""

    def __init__(self, patches: Patches) -> None:
        super().__init__()
        self._patches = patches
        self._drawn: list[Tensor] = []

    @contextmanager
    def of_patch(self, patch: int, sample: Tensor) -> Iterator[None]:
        """Within the context, ``torch.randn`` and similar functions return the patch's rows of noise for ``sample``."""
        if patch == 0:
            self._drawn = []
        self._index, self._patch, self._shape = 0, patch, list(sample.shape)
        self._dim, self._rows = self._patches.dim(sample), self._patches.of(sample, patch).shape
        with self:
            yield

    def __torch_function__(self, func: Callable, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        if func in (torch.randn, torch.rand):
            size = kwargs.pop("size", None) or (args if isinstance(args[0], int) else args[0])
            return self._draw(partial(func, **kwargs), size)
        if func in (torch.randn_like, torch.rand_like):
            x = kwargs.pop("input", None) if not args else args[0]
            return self._draw(lambda size: func(x.new_empty(size), **kwargs), x.shape)
        return func(*args, **kwargs)

    def _draw(self, draw: Callable[[list[int]], Tensor], size: Any) -> Tensor:
        size, dim = list(size), self._dim
        of_patch = len(size) == len(self._shape) and size[dim] == self._rows[dim]
        if of_patch:
            size[dim] = self._shape[dim]
        if self._patch == 0:
            self._drawn.append(draw(size))
        noise = self._drawn[self._index]
        self._index += 1
        return self._patches.of(noise, self._patch) if of_patch else noise
