"""One-way channels between stages.

NCCL has no message tags: on one communicator, what a rank receives is what the other sent next. So each channel is a
communicator of its own, with one sender and one receiver, who name the same messages in the same order. No message
waits for one of another channel; what it does wait for are computations that come earlier in the order of sub-steps.
"""

from collections import deque
from contextlib import AbstractContextManager
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor, nn

from xfuser.core.distributed.ending import end_group, new_group
from xfuser.core.hooks import Arguments, edited_arguments
from xfuser.methods.pipefusion.blocks import Chain
from xfuser.models.plan import ModelPlan

Route = tuple[str, int, int]  # what is sent (tokens, hints' tokens, latents, sound, skips), sending and receiving stage

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of tokens, by their tag


class Channel:
    """A first-in, first-out queue of messages from one rank to another; a message is some tensors.

    Args:
        group: the two ranks' own process group; ``peer``: the global rank at the other end.
        depth: number of sub-steps whose sends may be in flight. To wait for a send that is ``depth`` sub-steps old
            costs no time where the other end must have received it for this sub-step to exist.

    Attributes:
        tagged: whether a message says the dtypes of its tensors, which then travel in float32, so that its size is
            known; otherwise both ends know the dtype.
    """

    def __init__(self, group: dist.ProcessGroup, peer: int, depth: int) -> None:
        self._group, self._peer, self._depth = group, peer, depth
        self._substep, self.tagged = 0, False
        self._sent: deque[tuple[int, Tensor, dist.Work]] = deque()
        self._expected: deque[tuple[Tensor, list[int], dist.Work]] = deque()

    def send(self, parts: list[Tensor]) -> None:
        """Start sending these tensors as one message; the buffer is kept until it has been received."""
        if self.tagged:
            tags = torch.tensor([float(DTYPES.index(x.dtype)) for x in parts], device=parts[0].device)
            parts = [tags, *(x.float() for x in parts)]
        x = torch.cat([x.reshape(-1) for x in parts]) if len(parts) > 1 else parts[0].contiguous()
        self._sent.append((self._substep, x, dist.isend(x, self._peer, group=self._group)))

    def expect(self, counts: list[int], like: Tensor) -> None:
        """Post the receive of the next message, of tensors with so many elements, so that it overlaps with compute."""
        size = sum(counts) + len(counts) * self.tagged
        x = like.new_empty(size, dtype=torch.float32 if self.tagged else like.dtype)
        self._expected.append((x, counts, dist.irecv(x, self._peer, group=self._group)))

    def receive(self, counts: list[int], like: Tensor, following: list[int] | None = None) -> list[Tensor]:
        """The tensors of the next message, flat, in the dtype of ``like`` if the message does not say.

        ``following`` counts the elements of the message behind it, where they are known: its receive is posted.
        """
        if not self._expected:
            self.expect(counts, like)
        x, expected, work = self._expected.popleft()
        assert expected == counts, f"a message of {expected} elements was expected where {counts} are needed"
        work.wait()  # on NCCL by the stream of computation, on which what is done with the message is queued
        if following is not None:
            self.expect(following, like)
        if not self.tagged:
            return list(x.split(counts))
        tags, *parts = x.split([len(counts), *counts])
        return [part.to(DTYPES[int(tag)]) for tag, part in zip(tags.tolist(), parts, strict=True)]

    def end_substep(self) -> None:
        """Release the buffers of the sub-step that is ``depth`` sub-steps old."""
        self._substep += 1
        self.drain(self._depth)

    def drain(self, age: int = 0) -> None:
        """Wait until all that was sent has been received, but for what is less than ``age`` sub-steps old.

        On NCCL the stream of computation waits, not the host, and a buffer that is freed here is used again by what is
        queued on that stream, when it has been sent.
        """
        while self._sent and self._sent[0][0] <= self._substep - age:
            self._sent.popleft()[2].wait()

    def close(self) -> None:
        """Release the communicator, whatever is still in flight on it."""
        end_group(self._group)


def routes_of(plan: ModelPlan, chains: list[Chain], takers: set[int]) -> set[Route]:
    """The channels that a transformer needs, by the stage of each of its blocks.

    ``takers`` are the stages that need the latents of the last one, beside those which have the first blocks.
    """
    owners = chains[-1].owners
    routes = {(one.kind, *ends) for one in chains for ends in pairwise(sorted(set(one.owners)))}
    takers = takers | {one.owners[0] for one in chains}
    latents = {("latents", owners[-1], stage) for stage in takers if stage < owners[-1]}
    sound = {("sound", owners[-1], 0)} if plan.sound and owners[-1] else set()
    return routes | latents | sound | {route for _, route in skips(plan, owners)}


def open_channels(pipelines: list[list[int]], routes: set[Route], depth: int) -> dict[Route, Channel]:
    """This rank's channels to other stages of its pipeline.

    Every rank of the world must call it: ``pipelines`` are the global ranks of the stages of each pipeline.
    """
    channels, rank = {}, dist.get_rank()
    for kind, sender, receiver in sorted(routes):
        for ranks in pipelines:
            ends = [ranks[sender], ranks[receiver]]
            group = new_group(sorted(ends))
            if rank in ends:
                (peer,) = {*ends} - {rank}
                channels[kind, sender, receiver] = Channel(group, peer, depth)
    return channels


def skips(plan: ModelPlan, owners: list[int]) -> list[tuple[int, Route]]:
    """The consuming block of each long skip between two stages, and its route, in the order of consumption."""
    blocks = len(owners) if plan.skip else 0
    ends = [(i, ("skips", owners[blocks - 1 - i], owners[i])) for i in range(blocks // 2 + 1, blocks)]
    return [(consumer, route) for consumer, route in ends if route[1] != route[2]]


def skip_hook(consumer: nn.Module, name: str, channel: Channel, sends: bool) -> AbstractContextManager[None]:
    """A long skip from a block of one stage to a block of another, the consumer, whose argument it is.

    The producing stage sends it when the forward comes to the consumer's stub: behind its own last block, and in the
    order in which consumers take them.
    """

    def edit(arguments: Arguments) -> None:
        skip = arguments.get(name)
        if skip is not None and sends:
            channel.send([skip])
        elif skip is not None:
            arguments[name] = channel.receive([skip.numel()], skip)[0].view(skip.shape)

    return edited_arguments(consumer, edit)
