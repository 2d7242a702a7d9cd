"""PipeFusion of one wrapped pipeline."""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from xfuser.call import CallState
from xfuser.core.distributed import GroupCoordinator, get_world_group
from xfuser.core.hooks import Arguments, replaced
from xfuser.methods.pipefusion.blocks import StageBlocks
from xfuser.methods.pipefusion.channel import Channel, Route, open_channels, routes_of
from xfuser.methods.pipefusion.loop import (
    adapt_loop,
    boundary_of,
    branches_of,
    guiders_of,
    needs_whole_steps,
    stepwise_callbacks,
    stepwise_control,
)
from xfuser.methods.pipefusion.refusals import refuse
from xfuser.methods.pipefusion.scheduler import patchwise
from xfuser.methods.pipefusion.stage import Stage
from xfuser.models.registry import controlnets_of, planned_models

BY_BLOCK = ("load_ip_adapter", "set_ip_adapter_scale", "unload_ip_adapter")  # methods that number the attention modules
ONCE_A_STEP = "it may keep the previous step's prediction or count steps, but is called in every sub-step"


class PipeFusion:
    """The stages of a pipeline: blocks are divided while the pipeline is wrapped, all else exists during a call.

    Args:
        pipe: a pipeline; if it has several transformers, each of them runs some of the steps.
        group: the ranks that are stages of one pipeline.
        layers: number of blocks of each stage, for each transformer.

    Attributes:
        stages: this rank's stage of each transformer during a call.
    """

    def __init__(self, pipe: Any, group: GroupCoordinator, layers: dict[str, list[int]]) -> None:
        # A separate group outlives groups that later wraps replace, so that blocks can always be restored.
        group = GroupCoordinator(group.group_ranks, group.local_rank, dist.get_backend())
        self._pipe, self._group, models = pipe, group, planned_models(pipe, piped=True)
        self._blocks = [StageBlocks(*models[name], group, counts) for name, counts in layers.items()]
        self._hooks = ExitStack()
        for name in filter(lambda one: hasattr(pipe, one), BY_BLOCK):
            seeing_all = getattr(pipe, name)
            for blocks in self._blocks:
                seeing_all = blocks.with_all_blocks(seeing_all)
            self._hooks.enter_context(replaced(pipe, name, seeing_all))
        self._channels: dict[Route, Channel] = {}
        self._failed = False  # whether the last call failed while it used the channels
        self.stages: dict[nn.Module, Stage] = {}
        self._running: Stage | None = None  # the stage of the transformer that was called last

    def arguments(self, arguments: Arguments, call: CallState) -> Arguments:
        """Return the arguments of a pipeline's call, adapted to a loop over patches; all ranks must call this.

        Raises:
            ValueError: the arguments or the pipeline's guiders are not supported.
        """
        name = type(self._pipe).__name__
        if arguments.get("skip_guidance_layers") is not None:
            refuse(f"skip_guidance_layers of {name}", "it counts sub-steps as steps", "Remove it")
        layers, scale = getattr(self._pipe, "pag_applied_layers", None), arguments.get("pag_scale", 1.0)
        if layers and scale > 0 and self._group.world_size > 1:
            why = "it looks for its layers in blocks that other stages hold"
            refuse(f"perturbed-attention guidance (PAG) of {name}", why, "Set pag_scale=0", "Ulysses or ring")
        for guider in guiders_of(self._pipe):
            if type(guider).__name__ != "ClassifierFreeGuidance":
                refuse(f"{type(guider).__name__} of {name}", ONCE_A_STEP, "Use ClassifierFreeGuidance()")
        needs = needs_whole_steps(self._pipe, arguments)
        call.every_step_whole = any(get_world_group().all_gather_object(needs))  # one rank may have the callback
        return stepwise_callbacks(stepwise_control(self._pipe, arguments, call.patches), call)

    def enter(self, call: CallState) -> None:
        """During the call, the pipeline loops over patches, and this rank computes its stage."""
        self._check_models()
        if self._failed:
            self._group.barrier()  # stages reach the same failure one after the other
            self._close_channels()
        controlled = bool(controlnets_of(self._pipe))  # every stage runs the ControlNets, on fresh latents
        if not self._channels:
            takers = set(range(self._group.world_size)) if controlled else set()
            routes = set().union(*(routes_of(one.plan, one.chains, takers) for one in self._blocks))
            self._channels = open_channels(self._group.group_ranks, routes, call.patches)
        begins = partial(branches_of, self._pipe), self._start
        stages = {one.model: Stage(one, self._channels, call, *begins, controlled) for one in self._blocks}
        for stage in stages.values():
            stage.enter()
        self.stages, self._running = stages, next(iter(stages.values()))  # those of a call that runs already stay
        self._step_patches(call)
        call.enter_context(self._finishing(call))

    @contextmanager
    def _finishing(self, call: CallState) -> Iterator[None]:
        """At the end, check that the loop has ended, and wait until all messages have been received."""
        try:
            yield
            self._check_finished(call)
        except BaseException:
            # Messages may be in flight that no rank will receive. The next call closes the channels: closing here
            # would make other ranks fail and print their error before this rank has raised its own.
            self._failed = self._running.started
            raise
        finally:
            self.stages, self._running = {}, None
        for channel in self._channels.values():
            channel.drain()

    def _check_models(self) -> None:
        divided = [blocks.model for blocks in self._blocks]
        for name, (model, _) in planned_models(self._pipe, piped=True).items():
            if model not in divided:
                raise ValueError(
                    f"the {name} of this pipeline was replaced since the pipeline was wrapped, and PipeFusion divided"
                    " the blocks of the former one: call unwrap(), and wrap the pipeline again"
                )

    def stage_of(self, model: nn.Module) -> Stage:
        """This rank's stage of a transformer; for a ControlNet, the stage of the running transformer."""
        return self.stages.get(model, self._running)

    def _start(self, stage: Stage) -> None:
        """The transformer of a stage takes over: drop the state that the other stages have kept."""
        for other in self.stages.values():
            if other is not stage:
                other.forget()
        self._running = stage

    def _check_finished(self, call: CallState) -> None:
        if not call.whole and (self._group.world_size > 1 or call.patch):
            raise ValueError(
                f"the loop ended in step {call.step} of {call.steps}, at patch {call.patch}, where no stage has all"
                " latents: loop over the scheduler's timesteps to the end of a step, and fetch them after the call or"
                " active() began"
            )

    def _close_channels(self) -> None:
        for channel in self._channels.values():
            channel.close(self._failed)
        self._channels, self._failed = {}, False

    def remember(self) -> None:
        """Call :meth:`StageBlocks.remember` for each transformer."""
        for blocks in self._blocks:
            blocks.remember()

    def check(self) -> str | None:
        """Call :meth:`StageBlocks.check` for each transformer; return the first problem."""
        return next(filter(None, [blocks.check() for blocks in self._blocks]), None)

    def restore(self) -> None:
        """Restore all blocks on all stages; every stage must call it."""
        self._hooks.close()
        for blocks in self._blocks:
            blocks.restore()
        self._close_channels()
        self._group.destroy()

    def _step_patches(self, call: CallState) -> None:
        """During the call, the pipeline's scheduler steps patches; its progress bar and timesteps count steps."""
        pipe, patches = self._pipe, self._running.patches

        def end_substep(results: list[torch.Tensor], sample: torch.Tensor) -> None:
            self._running.end_substep(results, sample)
            if getattr(pipe, "_num_timesteps", 0) > call.steps:
                pipe._num_timesteps = call.steps  # the pipeline counted those of all patches

        end_sound = partial(self._end_sound, call) if any(one.plan.sound for one in self._blocks) else None
        # Not setattr(), which would register it as a component.
        call.callback(vars(pipe).__setitem__, "scheduler", pipe.scheduler)
        vars(pipe)["scheduler"] = patchwise(pipe.scheduler, call, patches, end_substep, boundary_of(pipe), end_sound)
        adapt_loop(pipe, call, patches.prepare)

    def _end_sound(self, call: CallState, latents: torch.Tensor, step: int, patch: int) -> None:
        """Complete the next latents of sound, which are stepped with patch 0, before the next step."""
        number, last, ends_step = self._group.rank_in_group, self._group.world_size - 1, patch == call.patches - 1
        if call.ends_whole(step):
            if ends_step:
                latents.copy_(self._group.broadcast(latents, src=last))
        elif channel := self._channels.get(("sound", last, 0)):
            if number == last and patch == 0:
                channel.send([latents])
            if number == 0 and ends_step:
                latents.copy_(channel.receive([latents.numel()], latents)[0].view(latents.shape))
