"""PipeFusion of one wrapped pipeline."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from xfuser.call import CallState
from xfuser.core.distributed import GroupCoordinator
from xfuser.core.hooks import Arguments, replaced
from xfuser.methods.pipefusion.blocks import StageBlocks
from xfuser.methods.pipefusion.channel import Channel, Route, open_channels
from xfuser.methods.pipefusion.loop import plain_steps, stepwise_callbacks, stepwise_progress
from xfuser.methods.pipefusion.patches import Patches
from xfuser.methods.pipefusion.scheduler import Latents, patchwise
from xfuser.methods.pipefusion.stage import Stage, routes
from xfuser.models.plan import ModelPlan
from xfuser.models.registry import planned_models


class PipeFusion:
    """The pipeline's stages: their blocks for as long as the pipeline is wrapped, all else during a call.

    Args:
        pipe: a pipeline with one transformer.
        group: the ranks that are stages of one pipeline.
        layers: number of blocks of each stage.

    Attributes:
        stage: this rank's stage during a call.
    """

    def __init__(self, pipe: Any, group: GroupCoordinator, layers: list[int]) -> None:
        # A group of its own outlives others that are made after this wrap: blocks can always be given back.
        self._group = GroupCoordinator(group.group_ranks, group.local_rank, dist.get_backend())
        self._pipe = pipe
        self._blocks = StageBlocks(*self._planned(), self._group, layers)
        self._channels: dict[Route, Channel] = {}
        self._failed = False  # the last call, with the channels in use
        self.stage: Stage | None = None

    def _planned(self) -> tuple[nn.Module, ModelPlan]:
        (planned,) = planned_models(self._pipe).values()
        return planned

    def arguments(self, arguments: Arguments, call: CallState) -> Arguments:
        """The arguments of a pipeline's call, for a loop that is led through patches.

        Raises:
            ValueError: they ask for what has no patches.
        """
        pipe = self._pipe
        if arguments.get("skip_guidance_layers") is not None:
            raise ValueError(
                f"skip_guidance_layers of {type(pipe).__name__} compares the number of the sub-step with that of steps:"
                " remove it under PipeFusion, or use other methods"
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
                " prediction, of which PipeFusion has a patch at a time: remove it, or use other methods"
            )
        _check_guiders(pipe)
        return stepwise_callbacks(arguments, call)

    @contextmanager
    def enter(self, call: CallState) -> Iterator[None]:
        """Within the context, the pipeline's loop goes through patches, and this rank computes its stage."""
        if self._failed:
            self._group.barrier()  # stages come to the same failure one after the other
            self._close_channels()
        model, plan = self._planned()
        owners = self._blocks.owners
        if not self._channels:
            self._channels = open_channels(self._group.group_ranks, routes(plan, owners), call.patches)
        patches = Patches(call.patches, getattr(model, "config", model), plan.frames)
        self.stage = Stage(model, plan, owners, self._group, self._channels, call, patches)
        with self.stage.active(), self._stepping(call, patches):
            try:
                yield
                self._check_whole(call)
            except BaseException:
                # Messages may be under way that nobody will take. Closing waits for the next call: here it would make
                # other ranks fail, and speak, before this one has told its error.
                self._failed = self.stage.started
                raise
            finally:
                self.stage = None
            for channel in self._channels.values():
                channel.drain()
            if getattr(self._pipe, "_num_timesteps", 0) > call.steps:
                self._pipe._num_timesteps = call.steps

    def _check_whole(self, call: CallState) -> None:
        if not call.whole and (self._group.world_size > 1 or call.patch):
            raise ValueError(
                f"the loop ended in step {call.step} of {call.steps}, at patch {call.patch}, where no stage has all"
                " latents: with PipeFusion it must go through the timesteps of the pipeline's scheduler to the end of a"
                " step, and fetch them after the call or active() began"
            )

    def _close_channels(self) -> None:
        for channel in self._channels.values():
            channel.close()
        self._channels, self._failed = {}, False

    def remember(self) -> None:
        """Note what this stage's blocks are like, when the wrap has done to them all that it does."""
        self._blocks.remember()

    def check(self) -> str | None:
        """Ahead of :meth:`restore`: why other stages could not take this one's blocks as they are; None if they can."""
        return self._blocks.check()

    def restore(self) -> None:
        """Give all stages all blocks again; every stage must call it."""
        self._blocks.restore()
        self._close_channels()
        self._group.destroy()

    @contextmanager
    def _stepping(self, call: CallState, patches: Patches) -> Iterator[None]:
        """Within the context, the pipeline's scheduler, progress bar and timesteps are led through patches."""
        channel = next((one for route, one in self._channels.items() if route[0] == "latents"), None)
        latents, pipe = Latents(self._group, channel, call, patches), self._pipe

        def end_substep(results: list[torch.Tensor]) -> None:
            self.stage.end_substep(results[0])
            latents.pass_on(results)

        own = vars(pipe)
        scheduler = own["scheduler"]
        own["scheduler"] = patchwise(scheduler, call, patches, end_substep)  # registers nothing
        try:
            with ExitStack() as stack:
                if hasattr(pipe, "progress_bar"):
                    stack.enter_context(replaced(pipe, "progress_bar", stepwise_progress(pipe.progress_bar, call)))
                if hasattr(pipe, "get_timesteps"):
                    stack.enter_context(replaced(pipe, "get_timesteps", plain_steps(pipe.get_timesteps, call)))
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
