"""Every method on a device that is as strict as a GPU under NCCL (``pretended``).

No operation is refused, there is no deadlock, and the host does not wait.
"""

from collections import Counter

import nccl
import pytest
import torch
import torch.distributed as dist
from pretended import NAME, pretended

from xfuser import xDiTParallel, xFuserArgs
from xfuser.core.distributed import destroy_distributed_environment
from xfuser.methods.masks import PairMasks
from xfuser.models.plan import blocks_of
from xfuser.models.registry import plan_of
from xfuser.testing import matrix
from xfuser.testing.loop import loop_of
from xfuser.testing.zoo import FAMILIES

READS = 2  # allowed reads of tensors by the host per step, or per sub-step of PipeFusion
TOLERANCES = matrix.TOLERANCES | {"sana_wm": 1e-3}  # one rank on the device differs from the CPU by 4e-4
UNLIKE = {"pixart", "sd3", "z_image", "cogvideox", "ltx2", "sana", "unet", "stable_audio"}
ELSEWHERE = {"kandinsky6_sr"}  # its FlexAttention supports only torch's own devices
FURTHER = [  # cells with masks over pairs and long text, and with other calls
    [("hunyuan_video_15", "pipefusion2 M=2 x ulysses2", {}), ("hunyuan_video_15", "ulysses2 x ring2", {})],
    [("flux", "cfg2", {"guidance": "sequential", "images": 3}), ("wan", "cfg2", {"guidance": "sequential"})],
]


def of_all_classes(method):
    """Return the cells of a method in the matrix; for four ranks, only those of ``UNLIKE`` classes."""
    several = matrix.METHODS[method][0] > 2
    names = [name for name, family in FAMILIES.items() if family.present and name not in ELSEWHERE]
    names = [name for name in names if name in UNLIKE or not several]
    return [(name, method, {}) for name in names if not matrix.refusal(name, method)]


def drawn(cells):
    """Return a rank's results on the device, cell by cell, and the records of each loop."""
    with pretended() as device:
        told = []
        for family, degrees, call in cells:
            try:
                told.append(drawn_one(device, FAMILIES[family], degrees, call))
            except Exception as error:
                raise RuntimeError(f"in the cell of {family}") from error
        destroy_distributed_environment()
        return told


def drawn_one(device, family, degrees, call):
    device.restart()
    pipe = loop_of(family)
    pipe.to(NAME)
    blocks = [block.module for block in blocks_of(pipe.transformer, plan_of(pipe.transformer))]
    parallel = xDiTParallel(pipe, *xFuserArgs(**degrees).create_config())
    with device.following(pipe.scheduler, blocks):
        result = parallel(family, **call)
    steps = range(device.step)
    pipe.to("cpu")  # like offloading
    parallel.unwrap()
    assert {weight.device.type for weight in pipe.transformer.parameters()} == {"cpu"}
    noted = [
        [one for one in ones if one.step in steps]
        for ones in (device.reads, device.messages.objects + device.messages.host)
    ]
    return [x.cpu() for x in result], device.messages.program, *noted


@pytest.mark.parametrize(
    "cells",
    [
        *(pytest.param(of_all_classes(method), id=method, marks=pytest.mark.matrix) for method in matrix.METHODS),
        *(pytest.param(cells, id=f"{cells[0][0]}, {cells[1][0]}") for cells in FURTHER),
    ],
)
def test_nothing_that_nccl_refuses_and_nothing_to_wait_for(pool, cells):
    """Each class is checked separately: communicators count as new."""
    settings = [matrix.setting(family, method, **changes) for family, method, changes in cells]
    calls = [(cell[0], degrees, call) for cell, (_, degrees, call) in zip(cells, settings, strict=True)]
    told = zip(*pool.run(max(ranks for ranks, *_ in settings), drawn, calls), strict=True)
    for (family, degrees, call), of_ranks in zip(calls, told, strict=True):
        results, programs, reads, waits = zip(*of_ranks, strict=True)
        expected = matrix.reference(family, degrees, call)
        worst = max(matrix.error(one, expected) for one in results)
        assert worst <= TOLERANCES.get(family, matrix.TOLERANCE), family
        assert nccl.replay(programs) == [], family
        assert not any(waits), f"{family}: the host exchanges objects or numbers within the loop"
        last = (call["num_inference_steps"] - 1) * degrees.get("num_pipeline_patch", 1)
        for ours in ([one for one in of_rank if one.is_ours] for of_rank in reads):
            assert max(Counter(one.step for one in ours).values(), default=0) <= READS, family
            assert not [one for one in ours if one.step >= last], family  # the last step reads no new values


def alone(fault):
    """Return the errors of two ranks with a fault."""
    with pretended() as device:
        try:
            fault(device)
        except RuntimeError as error:
            return str(error)
        finally:
            device.messages.settle()
        return device.messages.program, device.messages.objects, device.reads, device.messages.host


def strided(device):
    dist.all_reduce(torch.zeros(4, 3, device=NAME).T)


def on_the_host(device):
    dist.all_reduce(torch.zeros(4))


def of_another_dtype(device):
    dist.all_reduce(torch.zeros(4, dtype=torch.int16, device=NAME))


def of_different_sizes(device):
    parts = [torch.empty(size, device=NAME) for size in (3, 2)]
    dist.all_gather(parts, torch.zeros(parts[dist.get_rank()].shape, device=NAME))


def meet():
    """Wait for the other rank: otherwise a rank could leave before the other one connects to it."""
    store, rank = dist.distributed_c10d._get_default_store(), dist.get_rank()
    store.set(f"{rank} is here", b"")
    store.wait([f"{1 - rank} is here"])


def read_too_early(device):
    x, other = torch.zeros(4, device=NAME), 1 - dist.get_rank()
    works = [dist.irecv(x, other), dist.isend(torch.ones(4, device=NAME), other)]
    meet()
    x + 1
    [work.wait() for work in works]


def overwritten_too_early(device):
    x, other = torch.zeros(4, device=NAME), 1 - dist.get_rank()
    works = [dist.isend(x, other), dist.irecv(torch.empty(4, device=NAME), other)]
    meet()
    x.add_(1)
    [work.wait() for work in works]


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        (strided, "not contiguous"),
        (on_the_host, "on the CPU"),
        (of_another_dtype, "of torch.int16"),
        (of_different_sizes, "of different shapes"),
        (read_too_early, "still to arrive"),
        (overwritten_too_early, "still being sent"),
    ],
)
def test_a_fault_is_refused(pool, fault, told):
    assert all(told in one for one in pool.run(2, alone, fault))


def both_send_first(device):
    x, other = torch.zeros(4, device=NAME), 1 - dist.get_rank()
    works = [dist.isend(x, other), dist.irecv(torch.empty(4, device=NAME), other)]
    [work.wait() for work in works]


def of_two_lengths(device):
    x, other = torch.zeros(4 + dist.get_rank(), device=NAME), 1 - dist.get_rank()
    operations = [dist.P2POp(dist.isend, x[:4], other), dist.P2POp(dist.irecv, x[:4].clone(), other)]
    [work.wait() for work in dist.batch_isend_irecv(operations[:: 1 - 2 * dist.get_rank()])]


def of_objects(device):
    group = dist.new_group(backend="gloo")
    dist.all_gather_object([None, None], 1, group=group)
    dist.broadcast_object_list([1], group=group)


def of_values(device):
    x = torch.arange(4, device=NAME)
    bool(x.any()), x[0].item(), x.tolist(), x.cpu(), x.to("cpu"), torch.equal(x, x), x[x > 1], x.nonzero()


def test_orders_of_messages_are_compared(pool):
    programs = [one[0] for one in pool.run(2, alone, both_send_first)]
    assert nccl.replay(programs)  # gloo has tags, and runs both at the same time
    batched = [one[0] for one in pool.run(2, alone, of_two_lengths)]
    assert nccl.replay(batched) == []
    (kind, group, members, peer, ((sends, one, count), other)) = batched[0][1]
    batched[0][1] = (kind, group, members, peer, [(sends, one, count + 1), other])
    with pytest.raises(AssertionError, match="5 elements meet 4"):
        nccl.replay(batched)


def test_orders_of_collectives_are_compared():
    """Two ranks reach the collectives of two groups, or two collectives of one group, in different orders."""
    first, second = ("allreduce_", "a", (0, 1), None, 4), ("allreduce_", "b", (0, 1), None, 4)
    assert nccl.replay([[first, ("wait", 0), second, ("wait", 2)]] * 2) == []
    assert nccl.replay([[first, ("wait", 0), second, ("wait", 2)], [second, ("wait", 0), first, ("wait", 2)]])
    other = ("allgather_", "a", (0, 1), None, 4)
    assert nccl.replay([[first, other], [other, first]])
    with pytest.raises(AssertionError, match=r"\[4, 5\]"):
        nccl.replay([[first], [(*first[:4], 5)]])


def test_a_communicator_is_made_by_all_its_members():
    """Messages between two of three ranks are the first operation on the group's communicator."""
    join, members = ("join", "g", (0, 1, 2), None, 0), (0, 1, 2)
    ends = [("messages", "g", members, None, [(kind, peer, 4)]) for kind, peer in (("send", 1), ("receive", 0))]
    assert nccl.replay([[join, ends[0]], [join, ends[1]], []])
    assert nccl.replay([[join, ends[0]], [join, ends[1]], [join]]) == []


def test_what_the_host_waits_for_is_counted(pool):
    for _, objects, _, _ in pool.run(2, alone, of_objects):
        assert [one.what for one in objects] == ["all_gather_object", "broadcast_object_list"]
    for _, _, reads, _ in pool.run(2, alone, of_values):
        assert len(reads) == 8


def test_a_mask_that_changes_its_kind_is_refused():
    """All masks of a shape are treated like the first one: a different mask raises when the call ends."""
    masks = PairMasks("Linear")
    q, shown = torch.zeros(1, 1, 3, 4), torch.tensor([True, True, False]).view(1, 1, 1, 3)
    keys = shown & shown.mT
    with masks.alike():
        assert torch.equal(masks.over_keys(0, keys, q, q), shown) and torch.equal(masks.over_keys(0, keys, q, q), shown)
    with pytest.raises(ValueError, match="of Linear hides tokens from some others"), masks.alike():
        masks.over_keys(0, torch.ones(3, 3).tril().bool().view(1, 1, 3, 3), q, q)
