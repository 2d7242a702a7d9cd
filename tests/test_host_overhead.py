"""Host overhead of a wrapped call, counted in operators, as times vary."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from xfuser import xDiTParallel, xFuserArgs
from xfuser.bench import host_overhead
from xfuser.bench.host_overhead import DEGREES, DOUBLE, SINGLE
from xfuser.testing.loop import loop_of
from xfuser.testing.zoo import FAMILIES

MOST = {"Ulysses 2": 25, "ring 2": 19, "PipeFusion, a stage of 2": 46}  # additional operators per wrapped block
NOTICED = 2  # additional operators that the test must detect


class Count(TorchDispatchMode):
    """Counts the operators that are dispatched within the context."""

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += 1
        return func(*args, **(kwargs or {}))


def operators(model, scheduler):
    """Return the number of operators of a forward that is not the first one."""
    host_overhead.seconds(model, scheduler, 1)
    arguments = host_overhead.inputs()
    with torch.no_grad(), Count() as counted:
        model(**arguments, return_dict=False)
    return counted.count


@pytest.mark.parametrize("name", MOST)
def test_operators_of_a_wrapped_block(name):
    from diffusers import FlowMatchEulerDiscreteScheduler

    bare = operators(host_overhead.build(), FlowMatchEulerDiscreteScheduler()) / (DOUBLE + SINGLE)
    with host_overhead.wrapped(DEGREES[name]) as (model, scheduler, own):
        more = operators(model, scheduler) / own - bare
    assert MOST[name] - NOTICED <= more <= MOST[name]


def unhooked():
    """Return whether a wrap on one rank without degrees leaves all forwards as they are, without hooks."""
    pipe = loop_of(FAMILIES["flux"])
    modules = list(pipe.transformer.modules())
    before = [(module.forward, len(module._forward_pre_hooks), len(module._forward_hooks)) for module in modules]
    kept = F.scaled_dot_product_attention, pipe.scheduler.step, vars(pipe).copy()
    with xDiTParallel(pipe, *xFuserArgs().create_config()).active():
        hooks = [(module.forward, len(module._forward_pre_hooks), len(module._forward_hooks)) for module in modules]
        return hooks == before and kept == (F.scaled_dot_product_attention, pipe.scheduler.step, vars(pipe))


def test_one_rank_without_degrees_runs_the_bare_forward(pool):
    assert pool.run(1, unhooked) == [True]
