"""Transfer of tokens between stages: what one stage of a chain of blocks receives and sends."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from xfuser.call import CallState
from xfuser.core.hooks import edited_output, replaced
from xfuser.methods.pipefusion.blocks import Chain, Stub
from xfuser.methods.pipefusion.channel import Channel, Route, skip_hook, skips
from xfuser.methods.tokens import TokenShares, Window
from xfuser.models.plan import ModelPlan, Streams


class Relay:
    """One stage's part of a chain: receives tokens from the previous stage, and sends them to the next one.

    Args:
        number: the stage.
        channels: this rank's ends of the channels between stages.
        window: returns the tokens of a patch, given the number of image tokens and the patch.

    Attributes:
        own: the blocks of this stage.
        begins: whether this stage has the first block of the chain.
        holds: whether the running forward has its tokens on this stage.
    """

    def __init__(
        self, chain: Chain, number: int, plan: ModelPlan, channels: dict[Route, Channel], call: CallState,
        window: Callable[[int, int], Window],
    ) -> None:  # fmt: skip
        self._chain, self._number, self._plan, self._channels = chain, number, plan, channels
        self._call, self._window = call, window
        self._places = [i for i, owner in enumerate(chain.owners) if owner == number]
        self.own, self.begins = [chain.blocks[i] for i in self._places], 0 in self._places
        self.holds = False
        self._hints = int(chain.kind != "tokens")  # how many first outputs of a block stay on its stage
        self._skips = {} if self._hints else {i: one for i, one in skips(plan, chain.owners) if one in channels}

    def forget(self) -> None:
        """Drop the sizes of the last denoising loop's messages."""
        # For each message of this sub-step, and of the last asynchronous one: elements per token by stream, and shares.
        self._received: list[tuple[dict[str, int], TokenShares]] = []
        self._received_before: list[tuple[dict[str, int], TokenShares]] | None = None

    def end_substep(self) -> None:
        """Must be called after the scheduler's step."""
        if not self._call.synchronous:
            self._received_before = self._received
        self._received = []

    def enter(self) -> None:
        """During the call, tokens come from the previous stage and go to the next."""
        blocks, owners, places, call = self._chain.blocks, self._chain.owners, self._places, self._call
        for stub in (block.module for block in blocks if isinstance(block.module, Stub)):
            call.enter_context(replaced(stub, "passes", True))
        if places and places[-1] + 1 < len(blocks):
            self._to = self._channels[self._chain.kind, self._number, owners[places[-1] + 1]]
            call.enter_context(edited_output(blocks[places[-1]].module, self._send))
        for consumer, route in self._skips.items():
            sends = route[1] == self._number
            call.enter_context(skip_hook(blocks[consumer].module, self._plan.skip, self._channels[route], sends))
        if places and places[0] > 0:  # what the forward does after a block, it then does to received tokens
            self._from = self._channels[self._chain.kind, owners[places[0] - 1], self._number]
            call.enter_context(edited_output(blocks[places[0] - 1].module, self._receive))

    def _receive(self, output: Any) -> Any:
        """After the stub before this stage's first block: return the tokens that the previous stage sent."""
        self.holds, dim, shares = True, self._plan.carrier_dim, self._call.tokens
        passed = self._passed(self._places[0] - 1, output)
        like = {name: x for x, streams in passed for name in streams}
        rows = max(x.shape[1 - dim] for x in like.values())  # blocks before broadcast streams of one batch entry
        per_token = {name: rows * like[name].shape[2] for name in shares.own if name in like}
        self._received.append((per_token, shares))
        received = self._from.receive(self._sizes(per_token, shares), like["image"], self._next_sizes())
        if self._flagged:
            self._call.skips = bool(received.pop(0))
        shapes = [(rows, -1, like[name].shape[2]) if dim else (-1, rows, like[name].shape[2]) for name in per_token]
        parts = {name: part.view(shape) for name, shape, part in zip(per_token, shapes, received, strict=True)}
        for route in self._skips.values():
            if route[2] == self._number:
                self._channels[route].expect([like["image"].numel()], like["image"])
        joined = [torch.cat([parts[one] for one in streams], dim=dim) for _, streams in passed]
        return joined[0] if isinstance(output, Tensor) else (*output[: self._hints], *joined)

    def _send(self, output: Any) -> None:
        """After this stage's last block: send the tokens, image first, whatever their order in the block."""
        self.holds, counts, parts, flag = False, self._call.tokens.own, {}, []
        for x, streams in self._passed(self._places[-1], output):
            own = x.split([counts[stream] for stream in streams], self._plan.carrier_dim)
            parts |= dict(zip(streams, own, strict=True))
        if self._flagged:  # a cache's decision travels with the tokens
            flag = [parts["image"].new_full((1,), self._call.skips)]
        self._to.send([*flag, *(parts[stream] for stream in counts if stream in parts)])

    def _passed(self, place: int, output: Any) -> list[tuple[Tensor, Streams]]:
        """The tensors that a block passes to the next one, each with its streams."""
        tensors = [output] if isinstance(output, Tensor) else output
        streams = self._plan.outputs(self._chain.blocks[place].list_name)
        return [*zip(tensors, streams, strict=True)][self._hints :]

    @property
    def _flagged(self) -> bool:
        """Whether messages begin with a flag, which reports whether a cache skips the blocks."""
        return self._call.skips is not None and not self._hints

    def _next_sizes(self) -> list[int] | None:
        """Elements of each tensor of the next message; None where they are not certain."""
        number, patch = len(self._received), self._call.patch
        if self._received_before is None or self._call.synchronous:
            return None
        if number == len(self._received_before):
            following = self._call.after(self._call.step, patch)
            if following is None:
                return None
            number, patch = 0, following[1]
        per_token, shares = self._received_before[number]
        return self._sizes(per_token, replace(shares, window=self._window(shares.image, patch)))

    def _sizes(self, per_token: dict[str, int], shares: TokenShares) -> list[int]:
        """Elements of each tensor of a message, including the flag if it has one."""
        return [1] * self._flagged + [size * shares.own[stream] for stream, size in per_token.items()]
