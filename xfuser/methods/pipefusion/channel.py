"""One-way channels between stages.

NCCL has no message tags: on one communicator, what a rank receives is what the other sent next. So each channel is a
communicator of its own, with one sender and one receiver, who name the same messages in the same order. No message
waits for one of another channel; what it does wait for are computations that come earlier in the order of sub-steps.
"""

from collections import deque

import torch
import torch.distributed as dist

Route = tuple[str, int, int]  # what travels (tokens, latents, skips), the sending and the receiving stage


class Channel:
    """A first-in, first-out queue of tensors from one rank to another.

    Args:
        group: the two ranks' own process group; ``peer``: the global rank at the other end.
        depth: sub-steps of which sends may be under way. Waiting for one that is ``depth`` sub-steps old costs no time
            where the other end must have received it for this sub-step to exist.
    """

    def __init__(self, group: dist.ProcessGroup, peer: int, depth: int) -> None:
        self._group, self._peer, self._depth = group, peer, depth
        self._substep = 0
        self._sent: deque[tuple[int, torch.Tensor, dist.Work]] = deque()
        self._expected: deque[tuple[torch.Tensor, dist.Work]] = deque()

    def send(self, x: torch.Tensor) -> None:
        """Start sending; the buffer is kept until it has been received."""
        x = x.contiguous()
        self._sent.append((self._substep, x, dist.isend(x, self._peer, group=self._group)))

    def expect(self, like: torch.Tensor, count: int) -> None:
        """Post the receive of the next message, of ``count`` elements, so that it may come while others compute."""
        x = like.new_empty(count)
        self._expected.append((x, dist.irecv(x, self._peer, group=self._group)))

    def receive(self, like: torch.Tensor, count: int) -> torch.Tensor:
        """The next message, ``[count]``."""
        if not self._expected:
            self.expect(like, count)
        x, work = self._expected.popleft()
        assert x.numel() == count, f"a message of {x.numel()} elements was expected where {count} are needed"
        work.wait()
        return x

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
        dist.destroy_process_group(self._group)


def open_channels(pipelines: list[list[int]], routes: list[Route], depth: int) -> dict[Route, Channel]:
    """This rank's channels among all ``routes`` between the stages of its pipeline.

    Every rank of the world must call it: ``pipelines`` are the global ranks of the stages of each pipeline.
    """
    channels, rank = {}, dist.get_rank()
    for kind, sender, receiver in routes:
        for ranks in pipelines:
            ends = [ranks[sender], ranks[receiver]]
            group = dist.new_group(sorted(ends))
            if rank in ends:
                peer = ends[1] if rank == ends[0] else ends[0]
                channels[kind, sender, receiver] = Channel(group, peer, depth)
    return channels
