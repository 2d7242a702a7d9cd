"""From a plan's counts to seconds: the times of operators, messages and stages on a machine."""

from dataclasses import replace
from types import SimpleNamespace

import accelerator
import pytest
import torch
from test_planning import asked

from xfuser.planner import calibrate
from xfuser.planner.calibrate import NO_LIMIT
from xfuser.planner.cost import LINKS, Clock, fuse, program_of, with_norms
from xfuser.planner.estimate import Counted, Parts, estimate
from xfuser.planner.machines import Constants, machine_of
from xfuser.planner.rehearsal import alone_of, rehearse
from xfuser.planner.trace import ATTENTION, MATMUL, MEMORY, Message, Operator, Tracer, Wait

CONSTANTS = Constants(1e30, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0)  # a machine that equals its data sheet


def test_the_longest_chain():
    """A message overlaps with operators that do not wait for it; a slow host limits a fast device."""
    machine = replace(machine_of("CPU"), peak=1e9, synchronous=False, bandwidth=1e30, link=1e6, constants=CONSTANTS)
    product = Operator(MATMUL, 1e9, 0.0, False, (), ())  # a second
    message, ready = Message(1, "send", (0, 1), 10**6), Wait(1)  # one second each
    times = [
        Clock(machine).run(program_of(events)).device
        for events in ([message, product, ready], [message, ready, product], [product] * 3, [([product], 5)])
    ]
    assert times == pytest.approx([1, 2, 3, 5], rel=1e-3)
    slow = replace(machine, constants=replace(CONSTANTS, host=2.0))
    assert Clock(slow).run(program_of([product] * 3)).device == pytest.approx(7, rel=1e-3)


def test_a_processor_moves_its_messages_itself():
    """On a CPU, sends do not overlap with compute; receives cost nothing."""
    machine = replace(machine_of("CPU"), peak=1e9, bandwidth=1e30, link=1e6, constants=CONSTANTS)
    product = Operator(MATMUL, 1e9, 0.0, False, (), ())
    messages = [Message(1, "send", (0, 1), 10**6), Message(2, "recv", (0, 1), 10**6)]
    clock = Clock(machine).run(program_of([*messages, product, Wait(1), Wait(2)]))
    assert (clock.device, clock.spent[LINKS]) == pytest.approx((2, 1), rel=1e-3)
    slow = Clock(replace(machine, constants=replace(CONSTANTS, host=0.1))).run(program_of([*messages, product]))
    assert sum(slow.spent.values()) == pytest.approx(slow.device)  # all of it is explained


def test_activations_take_exponentials():
    """A feed-forward's GELU takes one per number, also if a compiler fuses it."""
    machine = replace(machine_of("CPU"), bandwidth=1e30, units=1, clock=1e9, exps=0.5, constants=CONSTANTS)
    moves = [Operator(MEMORY, 0.0, scores, False, ((0, 8),), ((1, 8),)) for scores in (8e9, 0.0)]
    seconds = [Clock(machine).run(program_of(moves, fused)).device for fused in (False, True)]
    assert seconds == pytest.approx([1, 1], rel=1e-3)
    x = torch.ones(3, 5)
    with Tracer() as tracer:
        torch.nn.functional.silu(torch.nn.functional.gelu(x))
    assert [event.scores for event in tracer.trace.events] == [15, 0]


def test_a_gpu_computes_an_rms_norm_by_one_kernel():
    norm, x = torch.nn.RMSNorm(8, eps=1e-6), torch.ones(3, 5, 8)
    tracer = Tracer()
    with torch.no_grad(), tracer.messages(), tracer:
        x = norm(norm(x)) + 1
    events = tracer.trace.events
    assert len(events) > 7 and len({event.norm for event in events}) == 3
    first, second, after = with_norms(events)
    size = x.nbytes
    assert [read for _, read in first.reads] == [size, 8 * 4] and [written for _, written in first.writes] == [size]
    assert second.reads[0][0] == first.writes[0][0] and after.reads[0][0] == second.writes[0][0]
    machine = replace(machine_of("H100"), constants=CONSTANTS)
    assert machine.norms and not machine_of("CPU").norms
    counts = [len(program_of(events, norms=norms).operators.kinds) for norms in (False, True)]
    assert counts == [len(events), 3]


def test_the_slowest_stage_sets_the_pace(folder_of):
    """The slowest stage may not be the first one, which is counted; its compute is estimated from its blocks."""
    machine = replace(machine_of("CPU"), peak=1e9, synchronous=False, bandwidth=1e30, constants=CONSTANTS)
    patch, whole = (program_of([Operator(MATMUL, 1e9, 0.0, False, (), ())] * count) for count in (1, 2))
    program = Counted(whole, [patch, patch], Parts({}), [1.0, 2.0], [])
    assert estimate(program, machine, 2, 6, False).seconds == pytest.approx(2 * 3 * 2 + 1)  # synchronous steps alone
    told = estimate(program, machine, 5, 1, False)
    assert told.step == pytest.approx(4) and told.seconds == pytest.approx(3 * 2 + 4 * 4 + 1)
    assert sum(told.spent.values()) == pytest.approx(told.seconds)
    args = asked(folder_of("flux"), {"pipefusion_parallel_degree": 2, "attn_layer_num_for_pp": [1, 3]})
    with alone_of(2):
        first, second = rehearse(*args.checked()).stages
    assert first == 1 and 2 < second < 4


def test_a_measured_peak_is_reached_whatever_the_power():
    machine = replace(machine_of("H100"), power=1.0, constants=replace(CONSTANTS, matmul=NO_LIMIT))
    assert machine.reached == 1 > machine_of("H100").reached


@pytest.mark.parametrize(("name", "tera"), [("A100", 19.5), ("H100", 67), ("RTX 4090", 82.6), ("L4", 30.3)])
def test_products_in_32_bits_are_computed_without_tensor_cores(name, tera):
    """By torch's default; convolutions use TF32."""
    machine = replace(machine_of(name), constants=replace(CONSTANTS, matmul=NO_LIMIT), bandwidth=1e30, clock=1e30)
    product = Operator(MATMUL, tera * 1e12, 0.0, True, (), ())
    seconds = [Clock(machine).run(program_of([x])).device for x in (product, product._replace(convolution=True))]
    assert seconds == pytest.approx([1, tera * 1e12 / (machine.peak / 2)], rel=0.02)


def measured(monkeypatch, **figures):
    """What a calibration of one rank with an accelerator comes to, with these results of its measurements."""
    accelerator.install(monkeypatch)
    monkeypatch.setattr(accelerator, "NAME", "NVIDIA GeForce RTX 4090")
    monkeypatch.setattr(calibrate, "get_world_group", lambda: SimpleNamespace(local_rank=0, world_size=1))
    monkeypatch.setattr(calibrate, "_of_first_rank", lambda machine: machine)
    rates = {"_products": 1.5e14, "_copies": 9e11, "_host": 1e-5, "_convolutions": 5e13} | figures
    for name, rate in ({"_attention": 1e14, "_activations": 1e11} | rates).items():
        monkeypatch.setattr(calibrate, name, lambda device, kind, rate=rate: rate(kind) if callable(rate) else rate)
    return calibrate.measure()


def test_a_cache_that_outruns_the_host_is_not_slower_than_the_memory(monkeypatch):
    """Small copies are issued one after the other, and a fast GPU waits for the host between them."""
    machine = measured(monkeypatch, _copies=lambda elements: 3e12 if elements < 1 << 24 else 4e12)
    copy = Operator(MEMORY, 0.0, 0.0, False, ((0, int(2e9)),), ((1, int(2e9)),))
    assert Clock(machine).run(program_of([copy])).device == pytest.approx(1e-3 + machine.constants.host, rel=0.05)


def test_one_rank_alone_measures_no_links(monkeypatch):
    """It has those of the data sheet; they are not as fast as its memory."""
    machine, sheet = measured(monkeypatch), machine_of("RTX 4090")
    message = Message(1, "all_gather", (0, 1), 10**9)
    assert machine.link_seconds(message) == pytest.approx(sheet.link_seconds(message))


def test_convolutions_are_slower_than_other_products():
    machine = replace(machine_of("CPU"), peak=1e9, bandwidth=1e30, constants=replace(CONSTANTS, convolution=0.25))
    one = Operator(MATMUL, 1e9, 0.0, False, (), ())
    seconds = [Clock(machine).run(program_of([x])).device for x in (one, one._replace(convolution=True))]
    assert seconds == pytest.approx([1, 4], rel=1e-3)


def test_heads_are_padded_as_kernels_do():
    machine = replace(machine_of("CPU"), peak=1e9, synchronous=False, bandwidth=1e30, constants=CONSTANTS)
    seconds = [
        Clock(machine).run(program_of([Operator(ATTENTION, 4.0 * size * 1e6, 1e6, False, (), ())])).device
        for size in (64, 88, 96)
    ]
    assert seconds == pytest.approx([0.256, 0.384, 0.384], rel=1e-3)


def test_a_compiler_fuses_what_only_moves_bytes():
    moves = [Operator(MEMORY, 0.0, 0.0, False, ((i, 8),), ((i + 1, 8),)) for i in range(3)]
    product = Operator(MATMUL, 1.0, 0.0, False, ((3, 8),), ((4, 8),))
    events, eager = fuse([*moves, product])
    assert [event.kind for event in events] == [MEMORY, MATMUL] and not any(eager)
    assert events[0].reads == ((0, 8),) and events[0].writes == ((3, 8),)


def test_a_compiler_does_not_see_attention_across_ranks():
    moves = [Operator(MEMORY, 0.0, 0.0, False, ((i, 8),), ((i + 1, 8),)) for i in range(30)]
    product = Operator(MATMUL, 1.0, 0.0, False, ((3, 8),), ((4, 8),))
    attention = Operator(ATTENTION, 1.0, 1.0, False, (), ())
    exchange = [Message(1, "send", (0, 1), 8), attention, Wait(1), attention]
    events, eager = fuse([product, *moves, *exchange, *moves[:12], product, *moves[12:14]])
    assert [event.kind for event, unseen in zip(events, eager, strict=True) if not unseen] == [MATMUL, MEMORY] * 2
    assert sum(eager) == 7 + len(exchange) + 12
    events, eager = fuse([product, Message(1, "all_reduce", (0, 1), 8), Wait(1), *moves, product])
    assert sum(eager) == 2 + 7
