"""One stage of one transformer during a call: which tokens a forward computes, and where they go next."""

from collections.abc import Callable, Hashable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from xfuser.call import CallState, Forward
from xfuser.core.attention.kv_buffer import KVBuffer
from xfuser.core.distributed import get_sp_group
from xfuser.core.hooks import Arguments, replaced
from xfuser.methods.pipefusion.blocks import StageBlocks
from xfuser.methods.pipefusion.channel import Channel, Route
from xfuser.methods.pipefusion.loop import once_a_step
from xfuser.methods.pipefusion.patches import Patches, zeros
from xfuser.methods.pipefusion.refusals import refuse
from xfuser.methods.pipefusion.relay import Relay
from xfuser.methods.tokens import Window

NOT_OF_ROWS = "it depends on the full latents or the number of the step, or its tokens are not rows of the latents"
SAME_CALLS = "Remove what changes guidance during the call"


class Stage:
    """The part of a transformer's forward that this rank computes, patch by patch.

    Layers that exchange outputs see only the part that this rank computes, :meth:`part`; a layer outside of them copies
    it into the full output.

    Args:
        channels: this rank's ends of the channels between stages.
        branches: returns values that change when the branches of guidance change.
        on_start: called with this stage when its transformer is first called in a denoising loop.
        controlled: whether the model takes residuals of ControlNets that compute the sub-step's patch.
    """

    def __init__(
        self, blocks: StageBlocks, channels: dict[Route, Channel], call: CallState,
        branches: Callable[[], list[Any]], on_start: Callable[["Stage"], None], controlled: bool,
    ) -> None:  # fmt: skip
        model, plan = blocks.model, blocks.plan
        self._model, self._plan, self._last, self._group = model, plan, blocks.last, blocks.group
        self._channels, self._call, self._on_start = channels, call, on_start
        self._branches_now, self._controlled, self._runs = branches, controlled, False
        self._name, self.number = type(model).__name__, self._group.rank_in_group
        self.patches = Patches(call.patches, getattr(model, "config", model), plan)
        self._chains = [Relay(one, self.number, plan, channels, call, self._window) for one in blocks.chains]
        self.forget()

    def forget(self) -> None:
        """Drop the state of the last denoising loop, or of this transformer's part of it."""
        self._first = 0  # step in which the transformer was first called
        self._latents: list[Tensor] = []  # input of each call of the first sub-step
        self._outputs: list[tuple[list[Tensor], Any]] = []  # full output of each call: tensors, tree
        self._autocast = False  # whether autocast chooses the dtypes of activations
        self._drop()
        for chain in self._chains:
            chain.forget()

    def _drop(self) -> None:
        """Drop the tensors of the whole image that are kept between sub-steps, for each call of the transformer."""
        self._buffers: dict[tuple[Hashable, int], KVBuffer] = {}
        self._states: dict[tuple[Hashable, int], Tensor] = {}

    def buffer(self, name: Hashable) -> KVBuffer:
        """The buffer of an attention, or of a convolution's map, of this name."""
        return self._buffers.setdefault((name, self._call.index), KVBuffer())

    def summed(self, name: Hashable, fresh: Tensor) -> Tensor:
        """The sum of all patches' states of a linear attention; ``fresh``, ``[patches, ...]``, has all of them, or only
        this sub-step's."""
        states = self._states.setdefault((name, self._call.index), fresh)
        if not self._call.synchronous:
            states[self._call.patch] = fresh[0]
        elif states is not fresh:
            states.copy_(fresh)
        return states.sum(dim=0)

    @property
    def is_last(self) -> bool:
        """Whether this stage has the last block."""
        return self.number == self._last

    @property
    def started(self) -> bool:
        """Whether this transformer has been called, and no other one since."""
        return bool(self._latents)

    @property
    def holds(self) -> bool:
        """Whether the running forward has reached this stage's blocks and not left them yet."""
        return self._chains[-1].holds

    def part(self, output: Any) -> Any:
        """Views of the rows of an output that this rank computes in this sub-step; no rows before the last stage."""
        parts, tree = tree_flatten(output)
        return tree_unflatten([self._part(x, bool(i and self._plan.sound)) for i, x in enumerate(parts)], tree)

    def _part(self, x: Tensor, is_sound: bool) -> Tensor:
        call, patches = self._call, self.patches
        if not self.is_last or (is_sound and not call.synchronous and call.patch):
            return x.narrow(patches.dim(x), 0, 0)
        return x if call.synchronous or is_sound else patches.of(patches.stepped(x), call.patch)

    def window(self, tokens: int) -> Window:
        """The tokens of this sub-step, for an image of ``tokens`` tokens."""
        return Window(range(tokens)) if self._call.synchronous else self._window(tokens, self._call.patch)

    def _window(self, tokens: int, patch: int) -> Window:
        return self.patches.window(self._latents[0], tokens, patch)

    def patch_tokens(self, tokens: int) -> list[range]:
        """The tokens of each patch, for an image of ``tokens`` tokens; the last patch is the smallest."""
        return [self._window(tokens, patch).image for patch in range(self._call.patches)]

    def enter(self) -> None:
        """During the call, this stage's part of the forward runs in place of the whole forward."""
        call = self._call
        call.around(self._model, self._layer)
        call.at_schedule(self.forget)
        embed, head = (name and self._model.get_submodule(name) for name in (self._plan.embed, self._plan.head))
        if embed:
            call.enter_context(replaced(embed, "forward", self._embedding(embed.forward)))
        if not self.is_last and isinstance(head, nn.Linear):
            call.enter_context(replaced(head, "forward", partial(zeros, dim=-1, size=head.out_features)))
        for chain in self._chains:
            chain.enter()
        if self._plan.text is None and call.patches > 1 and not call.compiled:
            for block in (block for chain in self._chains for block in chain.own):
                for name in self._plan.text_modules:
                    call.enter_context(once_a_step(block.module.get_submodule(name), call))

    def end_substep(self, results: list[Tensor], sample: Tensor) -> None:
        """Must be called after the scheduler's step, with the tensors that it returned and the latents that it stepped.

        ``results`` begin with the next latents. The last stage's latents go to the stages that need them. If a step
        ends with full latents on all ranks, ``results`` are completed in place.
        """
        call, latents = self._call, results[0]
        self._check_substep(latents, sample)
        for chain in self._chains:
            chain.end_substep()
        if call.ends_step and call.step + 1 == call.steps:
            self._drop()  # frees memory for the VAE
        for channel in self._channels.values():
            channel.end_substep()
        if call.ends_step and call.ends_whole(call.step):
            for x in results:
                x.copy_(self._group.broadcast(x, src=self._last))
        if not call.ends_whole(call.step):
            for (kind, sender, _), channel in self._channels.items():
                if kind == "latents" and sender == self.number:
                    channel.send([self.patches.of(latents, call.patch)])
        channel = self._channels.get(("latents", self._last, self.number))
        coming = self._following((call.step, call.patch))
        if channel and coming:
            rows, following = self.patches.of(latents, coming[1]), self._following(coming)
            counts = [self.patches.of(latents, following[1]).numel()] if following else None
            (received,) = channel.receive([rows.numel()], latents, counts)
            rows.copy_(received.view(rows.shape))

    def _following(self, substep: tuple[int, int]) -> tuple[int, int] | None:
        """The next sub-step, if its latents come from the last stage as a patch."""
        following = self._call.after(*substep)
        return None if following is None or self._call.ends_whole(following[0] - 1) else following

    def _check_substep(self, latents: Tensor, sample: Tensor) -> None:
        name, calls, before, kind = self._name, self._call.index + 1, len(self._latents), self.patches.kind
        if calls != before:
            refuse(f"{calls} calls of {name} in step {self._call.step}", f"the first had {before}", SAME_CALLS)
        if before and (self._call.step, self._call.patch) == (self._first, 0):
            self.patches.find_pictures(self._latents[0], sample, get_sp_group().world_size)
            if self.patches.ahead and self._plan.linear:
                self._call.extend(2)  # this step summed over other patches
        if any(kind(latents) != kind(self.patches.stepped(x)) for x in self._latents):
            what = f"a scheduler step of {tuple(latents.shape)} where {name} was given {tuple(self._latents[0].shape)}"
            refuse(what, "patches are rows of what the scheduler steps, which the transformer must get unchanged")

    def _layer(self, forward: Forward, arguments: Arguments) -> Any:
        """The outermost layer: copies the computed part of the output into the full output."""
        index = self._enter(arguments)
        if self._call.synchronous and self._call.patch > 0:
            kept, tree = self._outputs[index]
            return tree_unflatten([x.clone() for x in kept], tree)
        self._runs = True
        for chain in self._chains:
            chain.holds = chain.begins
        parts, tree = tree_flatten(forward(arguments))
        self._runs = False
        if self._call.synchronous:
            self._outputs[index:] = [(self._blank(parts, arguments), tree)]
        kept = self._outputs[index][0]
        given = [x.clone() for x in kept]

        def fill() -> None:
            for full in (kept, given):
                for x, part in zip(self.part(full), parts, strict=True):
                    x.copy_(part)

        self._call.when_there(fill, given)
        return tree_unflatten(given, tree)

    def _enter(self, arguments: Arguments) -> int:
        """Check a call of the transformer against earlier calls; return its index."""
        call, given = self._call, arguments[self._plan.latents]
        if not isinstance(first_of(given), Tensor):
            refuse(f"several images in one batch entry of {self._name}", NOT_OF_ROWS)
        latents = given if isinstance(given, Tensor) else given[0].expand(len(given), *given[0].shape)
        if not self.started or ((call.patch, call.index) == (0, 0) and self._changed(latents)):
            self._start(latents)
        residuals = () if self._controlled else self._plan.residuals
        for argument in (*residuals, *self._plan.counts_steps, *self._plan.beside):
            if arguments.get(argument) is not None:
                refuse(f"{argument!r} of {self._name}", NOT_OF_ROWS)
        if (call.step, call.patch) == (self._first, 0):
            self._latents.append(latents)
        before = [tuple(x.shape) for x in self._latents]
        if call.index >= len(before) or before[call.index] != latents.shape:
            what = f"latents of shape {tuple(latents.shape)} in call {call.index} of {self._name} in step {call.step}"
            refuse(what, f"those of the first step had {before}", SAME_CALLS)
        return call.index

    def _changed(self, latents: Tensor) -> bool:
        """Whether guidance begins or ends in this step, so that the kept state may belong to other branches."""
        return self._branches != self._branches_now() or latents.shape != self._latents[0].shape

    def _start(self, latents: Tensor) -> None:
        """Begin synchronous steps, which compute the whole image at once.

        Must be called before the transformer's first call, and where guidance begins or ends.
        """
        if self._controlled and self._call.step > 0:
            refuse(f"guidance of {self._name} that begins or ends", "ControlNets have run on a patch", SAME_CALLS)
        if not self._call.whole:
            what = f"calls of {self._name} with latents of shape {tuple(latents.shape)} from step {self._call.step} on"
            why = "they must begin with a synchronous step, and no stage has the full latents there"
            refuse(what, why, "Pass a callback_on_step_end, which makes the latents full after each step")
        if self.started:  # otherwise a ControlNet may have stored keys and values already
            self.forget()
        self._first, self._branches = self._call.step, self._branches_now()
        self._call.start(self._first)
        self._call.computes(self.part)
        self.patches.begin(latents)
        self._autocast = torch.is_autocast_enabled(latents.device.type)
        for (kind, *_), channel in self._channels.items():
            channel.tagged = self._autocast and kind not in ("latents", "sound")
        self._on_start(self)

    def _blank(self, parts: list[Tensor], arguments: Arguments) -> list[Tensor]:
        """Zeros in the shapes of the full outputs; ``parts`` are what this rank computes of them."""
        dtypes = [x.dtype for x in parts]
        if self._autocast:  # only the last stage has the dtypes of the output
            dtypes = self._group.broadcast_object(dtypes, src=self._last)
        latents, dim = self._latents[0], self.patches.dim
        lengths = [latents.shape[dim(latents)]] * len(parts)
        if self._plan.sound:
            lengths[1] = arguments[self._plan.sound].shape[1]
        return [zeros(x, dim(x), *what) for x, *what in zip(parts, lengths, dtypes, strict=True)]

    def _embedding(self, embed: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        """Embed the tokens of this sub-step on stages with first blocks; on others return zeros of the right shape.

        Outside of the model's forward, where pipelines embed tokens for a ControlNet, embed all of them.
        """

        embeds = any(chain.begins for chain in self._chains)

        def forward(latents: Tensor) -> Tensor:
            if not self._runs or (embeds and self._call.synchronous):
                return embed(latents)
            window = self.patches.window(latents, self.patches.row_count(latents), self._call.patch)
            rows = window.ranges if embeds else (range(1),)
            parts = [embed(self.patches.view(latents, one)) for one in rows]
            dim = self.patches.dim(parts[0])
            full = zeros(parts[0], dim, self.patches.row_count(latents))
            if embeds:
                for one, part in zip(rows, parts, strict=True):
                    full.narrow(dim, one.start, len(one)).copy_(part)
            return full

        return forward


def first_of(latents: Any) -> Any:
    """The latents, or the first one of a list with one entry per batch entry."""
    return latents[0] if isinstance(latents, list | tuple) else latents
