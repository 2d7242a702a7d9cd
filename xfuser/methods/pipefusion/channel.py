"""One-way channels between stages.

NCCL has no message tags: on one communicator, what a rank receives is what the other sent next. So each channel is a
communicator of its own, with one sender and one receiver, who name the same messages in the same order. No message
waits for one of another channel; what it does wait for are computations that come earlier in the order of sub-steps.
"""

from collections import deque

import torch
import torch.distributed as dist

from xfuser.core.distributed.ending import end_group, new_group

Route = tuple[str, int, int]  # what travels (tokens, latents, skips), the sending and the receiving stage

DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # of tokens, by their tag


class Channel:
    """A first-in, first-out queue of messages from one rank to another; a message is some tensors.

    Args:
        group: the two ranks' own process group; ``peer``: the global rank at the other end.
        depth: sub-steps of which sends may be under way. Waiting for one that is ``depth`` sub-steps old costs no time
            where the other end must have received it for this sub-step to exist.
    """

    def __init__(self, group: dist.ProcessGroup, peer: int, depth: int) -> None:
        self._group, self._peer, self._depth = group, peer, depth
        self._substep = 0
        self._sent: deque[tuple[int, torch.Tensor, dist.Work]] = deque()
        self._expected: deque[tuple[torch.Tensor, list[int], dist.Work]] = deque()
        self.begin(tagged=False)

    def begin(self, tagged: bool) -> None:
        """Ahead of a denoising loop: whether messages say what dtypes their tensors have.

        Otherwise both ends must know. Where they say it, all travels in float32, in a message of known size.
        """
        self._tagged = tagged

    def send(self, parts: list[torch.Tensor]) -> None:
        """Start sending these tensors as one message; the buffer is kept until it has been received."""
        if self._tagged:
            tags = torch.tensor([float(DTYPES.index(x.dtype)) for x in parts], device=parts[0].device)
            parts = [tags, *(x.float() for x in parts)]
        x = torch.cat([x.reshape(-1) for x in parts]) if len(parts) > 1 else parts[0].contiguous()
        self._sent.append((self._substep, x, dist.isend(x, self._peer, group=self._group)))

    def expect(self, counts: list[int], like: torch.Tensor) -> None:
        """Post the receive of the next message, of so many elements, so that it may come while others compute."""
        size = sum(counts) + len(counts) * self._tagged
        x = like.new_empty(size, dtype=torch.float32 if self._tagged else like.dtype)
        self._expected.append((x, counts, dist.irecv(x, self._peer, group=self._group)))

    def receive(self, counts: list[int], like: torch.Tensor) -> list[torch.Tensor]:
        """The tensors of the next message, flat; they are in the dtype of ``like``, if the message does not say."""
        if not self._expected:
            self.expect(counts, like)
        x, expected, work = self._expected.popleft()
        assert expected == counts, f"a message of {expected} elements was expected where {counts} are needed"
        work.wait()
        if not self._tagged:
            return list(x.split(counts))
        tags, *parts = x.split([len(counts), *counts])
        return [part.to(DTYPES[int(tag)]) for tag, part in zip(tags.tolist(), parts, strict=True)]

    def end_substep(self) -> None:
        """Let go of the buffers of the sub-step that is ``depth`` sub-steps old."""
        self._substep += 1
        self._wait_for(self._substep - self._depth)

    def drain(self) -> None:
        """Wait until all that was sent has been received."""
        self._wait_for(self._substep)

    def _wait_for(self, substep: int) -> None:
        while self._sent and self._sent[0][0] <= substep:
            self._sent.popleft()[2].wait()

    def close(self) -> None:
        """Release the communicator, whatever is still under way on it."""
        end_group(self._group)


def open_channels(pipelines: list[list[int]], routes: list[Route], depth: int) -> dict[Route, Channel]:
    """This rank's channels among all ``routes`` between the stages of its pipeline.

    Every rank of the world must call it: ``pipelines`` are the global ranks of the stages of each pipeline.
    """
    channels, rank = {}, dist.get_rank()
    for kind, sender, receiver in routes:
        for ranks in pipelines:
            ends = [ranks[sender], ranks[receiver]]
            group = new_group(sorted(ends))
            if rank in ends:
                peer = ends[1] if rank == ends[0] else ends[0]
                channels[kind, sender, receiver] = Channel(group, peer, depth)
    return channels
