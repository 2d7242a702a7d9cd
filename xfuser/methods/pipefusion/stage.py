"""One stage of one transformer's pipeline, during a call: which tokens a forward computes, and who gets them next."""

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial, wraps
from typing import Any

import torch
from torch import nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from xfuser.call import CallState, Forward
from xfuser.core.attention.kv_buffer import KVBuffer
from xfuser.core.distributed import GroupCoordinator
from xfuser.core.hooks import Arguments, edited_arguments, replaced
from xfuser.methods.pipefusion.channel import Channel, Route
from xfuser.methods.pipefusion.patches import Patches
from xfuser.methods.tokens import TokenShares, Window
from xfuser.models.plan import ModelPlan, Streams, blocks_of

SAME_CALLS = (
    "PipeFusion needs the same calls in every step. Remove what changes guidance during the call, or use other methods"
)


class Stage:
    """The part of a transformer's forward that this rank computes, patch by patch.

    What this rank computes of an output, :meth:`part`, is what the layers that exchange outputs see; outside of these,
    one layer puts it into the whole.

    Args:
        owners: the stage of each block.
        group: the ranks that are stages of the pipeline.
        channels: this rank's ends of the channels between stages.
        call: where the wrapped call stands.

    Attributes:
        number: this rank's place among the stages.
    """

    def __init__(
        self,
        model: nn.Module,
        plan: ModelPlan,
        owners: list[int],
        group: GroupCoordinator,
        channels: dict[Route, Channel],
        call: CallState,
        patches: Patches,
    ) -> None:
        self._model, self._plan, self._owners = model, plan, owners
        self._group, self.number = group, group.rank_in_group
        self._channels, self._call, self._patches = channels, call, patches
        self._forget()

    def _forget(self) -> None:
        """All that a denoising loop leaves behind."""
        self._latents: list[torch.Tensor] = []  # input of each call of the first sub-step
        self._outputs: list[tuple[list[torch.Tensor], Any]] = []  # whole output of each call: tensors, tree
        self._autocast = False  # whether the dtypes of activations depend on their operators
        self._buffers: dict[tuple[str, int], KVBuffer] = {}
        # Of each forward in this sub-step, elements per token, its shares, and the streams that were received; and of
        # those in a whole sub-step.
        self._received: list[tuple[int, TokenShares, tuple[str, ...]]] = []
        self._receives: list[tuple[int, TokenShares, tuple[str, ...]]] | None = None

    @property
    def is_last(self) -> bool:
        return self.number == self._owners[-1]

    @property
    def started(self) -> bool:
        """Whether the transformer has been called."""
        return bool(self._latents)

    def _assembled(self, forward: Forward, arguments: Arguments) -> Any:
        """The outermost layer: from the computed part of the output to the whole, as far as it is known here."""
        index = self._enter(arguments)
        if self._call.synchronous and self._call.patch > 0:
            kept, tree = self._outputs[index]
            return tree_unflatten([x.clone() for x in kept], tree)
        parts, tree = tree_flatten(forward(arguments))
        if self._call.synchronous:
            dtypes = self._output_dtypes(parts)
            self._outputs[index:] = [([self._blank(*one) for one in zip(parts, dtypes, strict=True)], tree)]
        kept = self._outputs[index][0]
        given = [x.clone() for x in kept]

        def fill() -> None:
            for whole in (kept, given):
                for x, part in zip(whole, parts, strict=True):
                    self.part(x).copy_(part)

        self._call.when_there(fill, given)
        return tree_unflatten(given, tree)

    def part(self, output: torch.Tensor) -> torch.Tensor:
        """View of what this rank computes of an output in this sub-step: no row of it before the last stage."""
        if not self.is_last:
            return self._patches.rows_of(output, range(0))
        if self._call.synchronous:
            return output
        return self._patches.rows_of(output, self._patches.rows(output, self._call.patch))

    def window(self, tokens: int) -> Window:
        """The tokens of this sub-step, of an image with that many."""
        if self._call.synchronous:
            return Window(range(tokens))
        return self._window(tokens, self._call.patch)

    def smallest_window(self, tokens: int) -> int:
        """Image tokens of the smallest patch, the last one."""
        return len(self._patches.tokens(self._latents[0], tokens, self._call.patches - 1))

    def renew(
        self,
        name: str,
        places: list[tuple[int, int]],
        total: int,
        k: torch.Tensor,
        v: torch.Tensor,
        mask: torch.Tensor | None,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """Fresh keys, values and key mask of one attention module in, those of the whole sequence out.

        ``places``, (first row, number of rows), and ``total`` say where the fresh rows lie, and in how many.
        """
        return self._buffers.setdefault((name, self._call.index), KVBuffer()).renew(k, v, mask, places, total)

    @contextmanager
    def active(self) -> Iterator[None]:
        """Within the context, tokens come from the previous stage and go to the next."""
        self._call.around(self._model, self._assembled)
        self._call.computes(self.part)
        blocks = blocks_of(self._model, self._plan)
        own = [block for block, owner in zip(blocks, self._owners, strict=True) if owner == self.number]
        with ExitStack() as stack:
            embed, head = (name and self._model.get_submodule(name) for name in (self._plan.embed, self._plan.head))
            if embed:
                stack.enter_context(replaced(embed, "forward", self._embedding(embed.forward)))
            if not self.is_last:
                send = partial(self._send, own[-1].list_name)
                stack.callback(own[-1].module.register_forward_hook(send).remove)
                if isinstance(head, nn.Linear):
                    stack.enter_context(replaced(head, "forward", _zeros_of(head)))
            for consumer, producer in skips(self._plan, self._owners):
                route = ("skips", self._owners[producer], self._owners[consumer])
                if route in self._channels:
                    stack.enter_context(self._skip(blocks[consumer].module, self._channels[route], route))
            if self.number > 0:  # outside of the skips: it posts their receives
                stack.enter_context(edited_arguments(own[0].module, partial(self._receive, own[0].list_name)))
            if self._plan.text is None and self._call.patches > 1 and not self._call.compiled:
                for block in own:
                    for name in self._plan.text_modules:
                        stack.enter_context(self._once_a_step(block.module.get_submodule(name)))
            yield

    def end_substep(self, latents: torch.Tensor) -> None:
        """To be called when the scheduler has stepped these latents."""
        if self._call.index + 1 != len(self._latents):
            raise ValueError(
                f"{type(self._model).__name__} was called {self._call.index + 1} times in a step, and"
                f" {len(self._latents)} times in the first one: {SAME_CALLS}"
            )
        dim = self._patches.dim(latents)
        if any(latents.shape[dim] != x.shape[dim] or latents.dim() != x.dim() for x in self._latents):
            raise ValueError(
                f"the scheduler steps latents of shape {tuple(latents.shape)}, and {type(self._model).__name__} was"
                f" given {tuple(self._latents[0].shape)}: PipeFusion's patches must be rows of both. Use other methods"
                " for pipelines that put pictures beside the latents, or step parts of them"
            )
        if not self._call.synchronous:
            self._receives = self._received
        self._received = []
        if self._call.ends_step and self._call.step + 1 == self._call.steps:
            self._buffers.clear()  # the VAE can have their memory
        for channel in self._channels.values():
            channel.end_substep()

    def _enter(self, arguments: Arguments) -> int:
        """Check a call of the transformer against those before; returns its index."""
        call, latents = self._call, arguments[self._plan.latents]
        if (call.step, call.patch, call.index) == (0, 0, 0):
            self._forget()
            self._autocast = torch.is_autocast_enabled(latents.device.type)
            for (kind, *_), channel in self._channels.items():
                channel.begin(tagged=self._autocast and kind != "latents")
        for name in (*self._plan.residuals, *self._plan.counts_steps):
            if arguments.get(name) is not None:
                raise ValueError(
                    f"PipeFusion does not serve {name!r} of {type(self._model).__name__}, which depends on the whole"
                    " latents or on the number of the step: use Ulysses, ring, CFG or data parallelism"
                )
        if (call.step, call.patch) == (0, 0):
            self._latents.append(latents)
        index = call.index
        shape = self._latents[index].shape if index < len(self._latents) else None
        if shape != latents.shape:
            raise ValueError(
                f"call {index} of {type(self._model).__name__} in step {call.step} has latents of shape"
                f" {tuple(latents.shape)}, and had {shape and tuple(shape)} in the first step: {SAME_CALLS}"
            )
        return index

    def _blank(self, part: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        dim = self._patches.dim(part)
        shape = list(part.shape)
        shape[dim] = self._latents[0].shape[dim]
        return part.new_zeros(shape, dtype=dtype)

    def _output_dtypes(self, parts: list[torch.Tensor]) -> list[torch.dtype]:
        """Those of the stage that computes the output; under autocast, what stands for it elsewhere has others."""
        dtypes = [x.dtype for x in parts]
        return self._group.broadcast_object(dtypes, src=self._owners[-1]) if self._autocast else dtypes

    def _window(self, tokens: int, patch: int) -> Window:
        return Window(self._patches.tokens(self._latents[0], tokens, patch), text=patch == 0)

    def _embedding(self, embed: Callable[[torch.Tensor], torch.Tensor]) -> Callable[[torch.Tensor], torch.Tensor]:
        """Computes the tokens of this sub-step on the first stage; elsewhere zeros, of which the shape matters."""

        def forward(latents: torch.Tensor) -> torch.Tensor:
            if self.number == 0 and self._call.synchronous:
                return embed(latents)
            count, rows = self._patches.row_count(latents), range(1)
            if self.number == 0:
                rows = self._patches.token_rows(latents, self._call.patch)
            tokens = embed(self._patches.rows_of(latents, self._patches.latent_rows(latents, rows)))
            dim = self._patches.dim(tokens)
            whole = tokens.new_zeros([*tokens.shape[:dim], count, *tokens.shape[dim + 1 :]])
            if self.number == 0:
                self._patches.rows_of(whole, rows).copy_(tokens)
            return whole

        return forward

    def _receive(self, blocks: str, arguments: Arguments) -> None:
        """Ahead of this stage's first block: the previous stage's tokens take the place of those that came here."""
        image, carriers = arguments[self._plan.image], self._plan.carriers(blocks)
        batch, _, width = image.shape
        counts = self._counts(carriers.values())
        channel = self._channels["tokens", self.number - 1, self.number]
        parts = channel.receive([batch * width * count for count in counts.values()], image)
        parts = {name: part.view(batch, -1, width) for name, part in zip(counts, parts, strict=True)}
        for name, streams in carriers.items():
            own = [parts[stream] for stream in streams]
            arguments[name] = own[0] if len(own) == 1 else torch.cat(own, dim=1)
        self._received.append((batch * width, self._call.tokens, tuple(counts)))
        self._expect_next(channel, image)
        for consumer, producer in skips(self._plan, self._owners):
            route = ("skips", self._owners[producer], self.number)
            if self._owners[consumer] == self.number and route in self._channels:
                self._channels[route].expect([image.numel()], image)

    def _expect_next(self, channel: Channel, like: torch.Tensor) -> None:
        """Post the next receive, where it is certain what it will be."""
        done = len(self._received)
        if self._receives is None or self._call.synchronous:
            return
        patch = self._call.patch
        if done == len(self._receives):
            following = self._call.after(self._call.step, patch)
            if following is None:
                return
            done, patch = 0, following[1]
        per_token, shares, streams = self._receives[done]
        coming = shares.at(self._window(shares.totals["image"], patch))
        channel.expect([per_token * coming.sizes[stream][coming.rank] for stream in streams], like)

    def _send(self, blocks: str, block: nn.Module, args: tuple, output: Any) -> None:
        """Behind this stage's last block: image tokens first, whatever the order in the blocks."""
        outputs = self._plan.outputs(blocks)
        tensors = [output] if isinstance(output, torch.Tensor) else output
        parts = {}
        for x, streams in zip(tensors, outputs, strict=True):
            sizes = [self._call.tokens.sizes[stream][self._call.tokens.rank] for stream in streams]
            parts |= dict(zip(streams, x.split(sizes, dim=1), strict=True))
        sent = [parts[stream] for stream in self._counts(outputs)]
        self._channels["tokens", self.number, self.number + 1].send(sent)

    def _counts(self, carried: Iterable[Streams]) -> dict[str, int]:
        """Tokens of this rank in each of the streams that are carried, in the order in which they travel."""
        names = {stream for streams in carried for stream in streams}
        return {name: sizes[self._call.tokens.rank] for name, sizes in self._call.tokens.sizes.items() if name in names}

    def _skip(self, consumer: nn.Module, channel: Channel, route: Route) -> AbstractContextManager[None]:
        """A long skip from a block of one stage to a block of another.

        The producing stage sends it when the forward comes to the consumer's stub: behind its own last block, and in
        the order in which consumers take them.
        """

        def edit(arguments: Arguments) -> None:
            skip = arguments.get(self._plan.skip)
            if skip is not None and route[1] == self.number:
                channel.send([skip])
            elif skip is not None:
                (received,) = channel.receive([skip.numel()], skip)
                arguments[self._plan.skip] = received.view(skip.shape)

        return edited_arguments(consumer, edit)

    def _once_a_step(self, module: nn.Module) -> AbstractContextManager[None]:
        """Within the context, a module that works on text alone computes with patch 0, and other patches reuse it."""
        outputs: dict[int, torch.Tensor] = {}
        original = module.forward

        @wraps(original)
        def forward(*args: Any, **kwargs: Any) -> torch.Tensor:
            if self._call.patch == 0:
                outputs[self._call.index] = original(*args, **kwargs)
            return outputs[self._call.index]

        return replaced(module, "forward", forward)


def _zeros_of(head: nn.Linear) -> Callable[[torch.Tensor], torch.Tensor]:
    return lambda tokens: tokens.new_zeros(*tokens.shape[:-1], head.out_features)


def skips(plan: ModelPlan, owners: list[int]) -> list[tuple[int, int]]:
    """(consumer, producer) of each long skip, in the order of consumption."""
    blocks = len(owners)
    return [(i, blocks - 1 - i) for i in range(blocks // 2 + 1, blocks)] if plan.skip else []


def routes(plan: ModelPlan, owners: list[int]) -> list[Route]:
    """The channels that the stages of a transformer with these block owners need."""
    last = owners[-1]
    hops = {("tokens", stage, stage + 1) for stage in range(last)}
    ends = {(owners[producer], owners[consumer]) for consumer, producer in skips(plan, owners)}
    latents = {("latents", last, 0)} if last else set()
    return sorted(hops | latents | {("skips", *pair) for pair in ends if pair[0] != pair[1]})
