"""One-way channels between stages.

NCCL has no message tags: on one communicator, a rank receives messages in the order in which the other rank sent them.
So each channel has its own communicator, with one sender and one receiver, which post the same messages in the same
order. A message waits only for computations that come earlier in the order of sub-steps, never for other channels.
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

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of tokens, indexed by their tag


class Channel:
    """A first-in, first-out queue of messages from one rank to another; a message is a list of tensors.

    Args:
        group: a process group of only these two ranks; ``peer``: the global rank at the other end.
        depth: number of sub-steps whose sends may be in flight. Waiting for a send that is ``depth`` sub-steps old
            costs no time if this sub-step could not have begun before the other end received it.

    Attributes:
        tagged: whether messages carry the dtypes of their tensors, which are then sent in float32, so that the size
            is known; otherwise both ends know the dtype.
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
        """Post the receive of the next message, so that it overlaps with compute; ``counts`` has elements by tensor."""
        size = sum(counts) + len(counts) * self.tagged
        x = like.new_empty(size, dtype=torch.float32 if self.tagged else like.dtype)
        self._expected.append((x, counts, dist.irecv(x, self._peer, group=self._group)))

    def receive(self, counts: list[int], like: Tensor, following: list[int] | None = None) -> list[Tensor]:
        """Return the tensors of the next message, flat, in the dtype of ``like`` unless the message carries dtypes.

        ``following`` counts the elements of the message after it, if they are known: its receive is then posted.
        """
        if not self._expected:
            self.expect(counts, like)
        x, expected, work = self._expected.popleft()
        assert expected == counts, f"a message of {expected} elements was expected where {counts} are needed"
        work.wait()  # on NCCL the compute stream waits, on which all work on the message is queued
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
        """Wait until all messages have been received, except those sent less than ``age`` sub-steps ago.

        On NCCL the compute stream waits, not the host. A buffer that is freed here is reused only by later work on that
        stream, after it has been sent.
        """
        while self._sent and self._sent[0][0] <= self._substep - age:
            self._sent.popleft()[2].wait()

    def close(self, unfinished: bool) -> None:
        """Release the communicator; ``unfinished``: messages may be in flight on it that no rank will receive."""
        end_group(self._group, unfinished)


def routes_of(plan: ModelPlan, chains: list[Chain], takers: set[int]) -> set[Route]:
    """The channels that a transformer needs, given the stages of the blocks in its chains.

    ``takers`` are stages that need the last stage's latents, in addition to those with the first block of a chain.
    """
    owners = chains[-1].owners
    routes = {(one.kind, *ends) for one in chains for ends in pairwise(sorted(set(one.owners)))}
    takers = takers | {one.owners[0] for one in chains}
    latents = {("latents", owners[-1], stage) for stage in takers if stage < owners[-1]}
    sound = {("sound", owners[-1], 0)} if plan.sound and owners[-1] else set()
    return routes | latents | sound | {route for _, route in skips(plan, owners)}


def open_channels(pipelines: list[list[int]], routes: set[Route], depth: int) -> dict[Route, Channel]:
    """This rank's channels to other stages of its pipeline.

    Every rank of the world must call it. ``pipelines`` has the global ranks of the stages of each pipeline.
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
    """For each long skip between two stages, its consuming block and its route, in the order of consumption."""
    blocks = len(owners) if plan.skip else 0
    ends = [(i, ("skips", owners[blocks - 1 - i], owners[i])) for i in range(blocks // 2 + 1, blocks)]
    return [(consumer, route) for consumer, route in ends if route[1] != route[2]]


def skip_hook(consumer: nn.Module, name: str, channel: Channel, sends: bool) -> AbstractContextManager[None]:
    """Transfer a long skip from a block of one stage to a block of another, the consumer, which has it as an argument.

    The producing stage sends it when the forward reaches the consumer's stub: after the stage's own last block, and in
    the order of the consumers.
    """

    def edit(arguments: Arguments) -> None:
        skip = arguments.get(name)
        if skip is not None and sends:
            channel.send([skip])
        elif skip is not None:
            arguments[name] = channel.receive([skip.numel()], skip)[0].view(skip.shape)

    return edited_arguments(consumer, edit)
