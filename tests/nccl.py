"""NCCL's rules of order, replayed without a GPU.

Each rank's program runs alone, over torch's fake process group, while what it asks of ``torch.distributed`` is
recorded. What a pipeline does next never depends on data, so this is what it would do. The programs are then replayed
together under rules that are stricter than NCCL's: a communicator executes one operation after the other, in the order
in which the rank issued them; a send completes only while the other end is at the matching receive, a collective only
when every member is at it; and a rank stands still until what it waits for is complete.
"""

from contextlib import contextmanager
from unittest import mock

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore


class Handle:
    """Stands in for a work handle: waiting is recorded, too."""

    def __init__(self, program, index):
        self._program, self._index = program, index

    def wait(self, *args):
        self._program.append(("wait", self._index))


@contextmanager
def recorded(rank, ranks):
    """Within the context this process is one of many ranks; gives the program that it runs."""
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


def replay(programs):
    """Run the ranks' programs together; returns the events that never come to an end, with their ranks."""
    at = [0] * len(programs)  # next event of each rank
    queues = [{} for _ in programs]  # by communicator: operations issued and not complete
    complete = [set() for _ in programs]
    progress = True
    while progress:
        progress = False
        for rank, program in enumerate(programs):
            while at[rank] < len(program):
                event = program[at[rank]]
                if event[0] == "wait":
                    if event[1] not in complete[rank]:
                        break
                else:
                    queues[rank].setdefault(event[1], []).append(at[rank])
                at[rank] += 1
                progress = True
        for rank, queue in enumerate(queues):
            for group in list(queue):
                done = _match(programs, queues, rank, group)
                for member in done:
                    complete[member].add(queues[member][group].pop(0))
                    if not queues[member][group]:
                        del queues[member][group]
                progress |= bool(done)
    stuck = [(rank, program[at[rank]]) for rank, program in enumerate(programs) if at[rank] < len(program)]
    left = [(rank, programs[rank][one]) for rank, queue in enumerate(queues) for ones in queue.values() for one in ones]
    return stuck + left


def _match(programs, queues, rank, group):
    """The ranks whose first operation on a communicator completes now."""
    kind, _, members, peer, count = _head(programs, queues, rank, group)
    if kind in ("send", "receive"):
        other = _head(programs, queues, peer, group)
        wanted = "receive" if kind == "send" else "send"
        if other is None or other[0] != wanted or other[3] != rank:
            return []
        assert other[4] == count, f"{count} elements meet {other[4]} between ranks {rank} and {peer} of {group}"
        return [rank, peer]
    heads = [_head(programs, queues, member, group) for member in members]
    return list(members) if all(head and head[0] == kind for head in heads) else []


def _head(programs, queues, rank, group):
    queue = queues[rank].get(group)
    return programs[rank][queue[0]] if queue else None
