"""PipeFusion of one wrapped pipeline."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from xfuser.core.distributed import GroupCoordinator
from xfuser.core.hooks import Arguments, Binder, replaced
from xfuser.methods.pipefusion.blocks import StageBlocks
from xfuser.methods.pipefusion.channel import Channel, Route, open_channels
from xfuser.methods.pipefusion.clock import Clock
from xfuser.methods.pipefusion.loop import has_callback, plain_steps, stepwise_callbacks, stepwise_progress
from xfuser.methods.pipefusion.patches import Patches
from xfuser.methods.pipefusion.scheduler import Latents, patchwise
from xfuser.methods.pipefusion.stage import Stage, routes
from xfuser.models.plan import ModelPlan


class PipeFusion:
    """The pipeline's stages: their blocks for as long as the pipeline is wrapped, all else during a call.

    Args:
        models: the pipeline's transformers with their plans.
        group: the ranks that are stages of one pipeline.
        layers: number of blocks of each stage, for each transformer.
        patches: M; ``warmup``: synchronous first steps.
    """

    def __init__(
        self,
        models: dict[str, tuple[nn.Module, ModelPlan]],
        group: GroupCoordinator,
        layers: dict[str, list[int]],
        patches: int,
        warmup: int,
    ) -> None:
        # A group of its own outlives others that are made after this wrap: blocks can always be given back.
        self._group = GroupCoordinator(group.group_ranks, group.local_rank, dist.get_backend())
        self._patches, self._warmup = patches, warmup
        self._blocks = {name: StageBlocks(*models[name], self._group, counts) for name, counts in layers.items()}
        self._channels: dict[str, dict[Route, Channel]] = {}
        self._failed = False  # the last call, with the channels in use
        self._clock: Clock | None = None
        self._stages: dict[str, Stage] = {}

    def arguments(self, pipe: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[Arguments, bool]:
        """The arguments of a pipeline's call, and whether it needs whole latents after each step."""
        arguments = Binder(pipe.__call__)(args, kwargs)
        if arguments.get("skip_guidance_layers") is not None:
            raise ValueError(
                f"skip_guidance_layers of {type(pipe).__name__} compares the number of the sub-step with that of steps:"
                " leave it away under PipeFusion, or use other methods"
            )
        layers, scale = getattr(pipe, "pag_applied_layers", None), arguments.get("pag_scale", 1.0)
        if layers and scale > 0 and self._group.world_size > 1:
            raise ValueError(
                f"perturbed-attention guidance (PAG) of {type(pipe).__name__} looks for its layers in blocks that other"
                " stages hold: set pag_scale=0, or use Ulysses or ring"
            )
        if arguments.get("guidance_rescale"):
            raise ValueError(
                f"guidance_rescale={arguments['guidance_rescale']} of {type(pipe).__name__} looks at the whole"
                " prediction, of which PipeFusion has a patch at a time: leave it away, or use other methods"
            )
        _check_guiders(pipe)
        return stepwise_callbacks(arguments, lambda: self._clock), has_callback(arguments)

    @contextmanager
    def active(
        self,
        pipe: Any,
        models: dict[str, tuple[nn.Module, ModelPlan]],
        when_there: Callable[..., None],
        every_step_whole: bool,
    ) -> Iterator[dict[str, Stage]]:
        """Within the context, the pipeline's loop goes through patches; gives the stage of each transformer."""
        if self._failed:
            self._group.barrier()  # stages come to the same failure one after the other
            self._close_channels()
        clock = self._clock = Clock(self._patches, self._warmup, every_step_whole)
        with ExitStack() as stack:
            for name, (model, plan) in models.items():
                owners = self._blocks[name].owners
                if name not in self._channels:
                    self._channels[name] = open_channels(self._group.group_ranks, routes(plan, owners), clock.patches)
                patches = Patches(clock.patches, getattr(model, "config", model), plan.frames)
                stage = Stage(model, plan, owners, self._group, self._channels[name], clock, patches, when_there)
                self._stages[name] = stage
                stack.enter_context(stage.active())
            stack.enter_context(self._stepping(pipe, patches))
            try:
                yield self._stages
                self._check_whole()
            except BaseException:
                # Messages may be under way that nobody will take. Closing waits for the next call: here it would make
                # other ranks fail, and speak, before this one has told its error.
                self._failed = any(stage.started for stage in self._stages.values())
                raise
            finally:
                self._stages = {}
            for channel in self._all_channels():
                channel.drain()
            if getattr(pipe, "_num_timesteps", 0) > clock.steps:
                pipe._num_timesteps = clock.steps

    def _check_whole(self) -> None:
        clock = self._clock
        if not clock.whole and (self._group.world_size > 1 or clock.patch):
            raise ValueError(
                f"the loop ended in step {clock.step} of {clock.steps}, at patch {clock.patch}, where no stage has all"
                " latents: with PipeFusion it must go through the timesteps of the pipeline's scheduler to the end of a"
                " step, and fetch them after the call or active() began"
            )

    def _all_channels(self) -> list[Channel]:
        return [channel for channels in self._channels.values() for channel in channels.values()]

    def _close_channels(self) -> None:
        for channel in self._all_channels():
            channel.close()
        self._channels, self._failed = {}, False

    def restore(self) -> None:
        """Give all stages all blocks again; every stage must call it."""
        for blocks in self._blocks.values():
            blocks.restore()
        self._close_channels()
        self._group.destroy()

    @contextmanager
    def _stepping(self, pipe: Any, patches: Patches) -> Iterator[None]:
        """Within the context, the pipeline's scheduler, progress bar and timesteps are led through patches."""
        (channels, *_) = self._channels.values()
        channel = next((one for route, one in channels.items() if route[0] == "latents"), None)
        latents = Latents(self._group, channel, self._clock, patches)

        def end_substep(results: list[torch.Tensor]) -> None:
            for stage in self._stages.values():
                stage.end_substep(results[0])
            latents.pass_on(results)

        own = vars(pipe)
        scheduler = own["scheduler"]
        own["scheduler"] = patchwise(scheduler, self._clock, patches, end_substep)  # registers nothing
        try:
            with ExitStack() as stack:
                if hasattr(pipe, "progress_bar"):
                    bar = stepwise_progress(pipe.progress_bar, self._clock)
                    stack.enter_context(replaced(pipe, "progress_bar", bar))
                if hasattr(pipe, "get_timesteps"):
                    stack.enter_context(replaced(pipe, "get_timesteps", plain_steps(pipe.get_timesteps, self._clock)))
                yield
        finally:
            own["scheduler"] = scheduler


def _check_guiders(pipe: Any) -> None:
    """Refuse guiders that look at the whole prediction, or remember those of steps before."""
    for guider in pipe.components.values():
        if not getattr(guider, "_enabled", False) or not hasattr(guider, "prepare_inputs"):
            continue
        from diffusers.guiders import ClassifierFreeGuidance  # not in all releases, and only here is one sure to be

        if type(guider) is not ClassifierFreeGuidance or guider.config.guidance_rescale:
            raise ValueError(
                f"PipeFusion does not serve {type(guider).__name__} of {type(pipe).__name__}, which looks at the whole"
                " prediction or counts steps: make the guider a ClassifierFreeGuidance() without guidance_rescale, or"
                " use other methods"
            )
