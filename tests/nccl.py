"""Replay NCCL's ordering rules without a GPU.

Each rank's program runs separately over torch's fake process group, and its calls to ``torch.distributed`` are
recorded. The control flow of a pipeline never depends on data, so a real run makes the same calls. The programs are
then replayed together under rules that are stricter than NCCL's: a communicator executes its operations one after the
other, in the order in which the rank issued them; a send completes only while the other end is at the matching
receive, a collective only when every member has reached it; and a rank blocks until the operation that it waits for is
complete.
"""

from contextlib import contextmanager
from unittest import mock

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


class Handle:
    """Replaces a work handle, and records the wait."""

    def __init__(self, program, index):
        self._program, self._index = program, index

    def wait(self, *args):
        self._program.append(("wait", self._index))


@contextmanager
def recorded(rank, ranks):
    """Within the context, this process is one of ``ranks`` ranks; yields the program that it runs."""
    program, names = [], {}

    def name_of(group):
        return names.get(group, "world")

    def issue(kind, members, group, peer=None, count=0):
        program.append((kind, name_of(group), tuple(members), peer, count))
        return Handle(program, len(program) - 1)

    def new_group(members=None, *args, **kwargs):
        group = make_group(members, *args, **kwargs)
        names[group] = f"group {made[0]} of {members}"
        made[0] += 1
        return group

    def isend(tensor, dst, group=None, **kwargs):
        return issue("send", dist.get_process_group_ranks(group), group, dst, tensor.numel())

    def irecv(tensor, src, group=None, **kwargs):
        return issue("receive", dist.get_process_group_ranks(group), group, src, tensor.numel())

    def collective(kind):
        def call(*args, group=None, **kwargs):
            issue(kind, dist.get_process_group_ranks(group), group).wait()

        return call

    made, make_group = [0], dist.new_group
    replaced = {"new_group": new_group, "isend": isend, "irecv": irecv}
    replaced |= {name: collective(name) for name in ("all_gather", "all_to_all_single", "broadcast", "barrier")}
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=ranks)
    patches = [mock.patch.object(dist, name, value) for name, value in replaced.items()]
    for patch in patches:
        patch.start()
    try:
        yield program
    finally:
        for patch in patches:
            patch.stop()


class Replay:
    """Runs the programs of all ranks together.

    An event is ``(kind, communicator, members, peer, count)``: a collective; a ``send`` or ``receive``; ``messages``,
    with a list of (send or receive, peer, elements) that are issued together as count; or a ``join``, where the rank
    blocks until all members have reached it. ``("wait", i)`` waits for event i of the same rank.
    """

    def __init__(self, programs):
        self._programs, self._at = programs, [0] * len(programs)  # next event of each rank
        self._queues = [{} for _ in programs]  # by communicator: issued operations that are not complete
        self._open = [{} for _ in programs]  # by operation: messages that have not met their other end
        self._complete = [set() for _ in programs]
        self._joined = set()

    def run(self):
        """Return the events that never complete, with their ranks."""
        while any([self._issue(rank) for rank in range(len(self._programs))] + [self._advance()]):
            pass
        ends = [(rank, one[self._at[rank]]) for rank, one in enumerate(self._programs) if self._at[rank] < len(one)]
        left = [(rank, index) for rank, queue in enumerate(self._queues) for ones in queue.values() for index in ones]
        return ends + [(rank, self._programs[rank][index]) for rank, index in left]

    def _issue(self, rank):
        """Advance a rank until it blocks; return whether it advanced."""
        program, start = self._programs[rank], self._at[rank]
        while self._at[rank] < len(program):
            event = program[self._at[rank]]
            if event[0] == "wait" and event[1] not in self._complete[rank]:
                break
            if event[0] == "join":
                self._joined.add((rank, event[1]))
                if not all((member, event[1]) in self._joined for member in event[2]):
                    break
            elif event[0] != "wait":
                self._queues[rank].setdefault(event[1], []).append(self._at[rank])
                self._open[rank][self._at[rank]] = _messages(event)
            self._at[rank] += 1
        return self._at[rank] > start

    def _advance(self):
        """Complete all operations that can complete; return whether there were any."""
        moved = False
        for rank, queue in enumerate(self._queues):
            for group in list(queue):
                while group in queue and self._match(rank, group):
                    moved = True
        return moved

    def _match(self, rank, group):
        """Complete the first operation of a rank on a communicator, or one of its messages; return whether it could."""
        index = self._head(rank, group)
        kind, _, members, _, count = self._programs[rank][index]
        if self._open[rank][index]:
            return any([self._meet(rank, group, index, message) for message in list(self._open[rank][index])])
        heads = {member: self._head(member, group) for member in members}
        events = [self._programs[member][head] for member, head in heads.items() if head is not None]
        if len(events) < len(heads) or any(event[0] != kind for event in events):
            return False
        if kind.startswith("alltoall"):
            _check_shares(members, [event[4] for event in events], group)
        else:
            assert all(event[4] == count for event in events), f"{kind} of {group}: {[event[4] for event in events]}"
        for member, head in heads.items():
            self._pop(member, group, head)
        return True

    def _meet(self, rank, group, index, message):
        kind, peer, count = message
        head = self._head(peer, group)
        other = ("receive" if kind == "send" else "send", rank)
        meets = [] if head is None else [one for one in self._open[peer][head] if one[:2] == other]
        if not meets:
            return False
        assert meets[0][2] == count, f"{count} elements meet {meets[0][2]} between ranks {rank} and {peer} of {group}"
        for end, place, one in ((rank, index, message), (peer, head, meets[0])):
            self._open[end][place].remove(one)
            if not self._open[end][place]:
                self._pop(end, group, place)
        return True

    def _head(self, rank, group):
        return self._queues[rank].get(group, [None])[0]

    def _pop(self, rank, group, index):
        self._queues[rank][group].remove(index)
        self._complete[rank].add(index)
        if not self._queues[rank][group]:
            del self._queues[rank][group]


def _messages(event):
    """Return the messages of an event: kind, peer, elements."""
    kind, _, _, peer, count = event
    return list(count) if kind == "messages" else [(kind, peer, count)] if kind in ("send", "receive") else []


def _check_shares(members, counts, group):
    """Check that each rank sends as much to each other rank as that rank receives from it."""
    if all(isinstance(count, int) for count in counts):
        assert len(set(counts)) == 1, f"all-to-all of {group}: {counts}"
        return
    for i in range(len(members)):
        for j in range(len(members)):
            (sent, _), (_, received) = counts[i], counts[j]
            assert sent[j] == received[i], f"all-to-all of {group}: {sent[j]} elements meet {received[i]}"


def replay(programs):
    """Run the ranks' programs together; return the events that never complete, with their ranks."""
    return Replay(programs).run()
