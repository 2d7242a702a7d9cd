"""Estimate the seconds of a whole call: text encoders, all steps, and the VAE."""

from collections import Counter
from dataclasses import dataclass, field

from xfuser.planner.cost import BUBBLES, HOST, LINKS, TEXT, VAE, Clock, Program, program_of
from xfuser.planner.machines import Machine
from xfuser.planner.rehearsal import Rehearsed
from xfuser.planner.trace import Event, Message
from xfuser.weights.text_encoders import PREFIX


class Parts:
    """Components that run once per call, outside the steps: programs by component name."""

    def __init__(self, programs: dict[str, Program]) -> None:
        self._programs = programs
        self._known: dict[Machine, Counter] = {}

    def seconds(self, machine: Machine) -> Counter:
        """Seconds of the text encoders (``TEXT``), and of all other components (``VAE``)."""
        if machine not in self._known:
            self._known = {machine: Counter()}
            for name, program in self._programs.items():
                kind = TEXT if name.startswith(PREFIX) else VAE
                self._known[machine][kind] += Clock(machine).run(program).device
        return self._known[machine]


@dataclass
class Counted:
    """A rehearsal converted to programs, to estimate its time on any machine.

    Attributes:
        first, steps: the first step, and each sub-step of the last step (with PipeFusion, the last asynchronous one).
        stages: computation of each PipeFusion stage relative to the first, which is the rehearsed one.
        between: the messages from one stage to the next in a synchronous step.
    """

    first: Program
    steps: list[Program]
    parts: Parts
    stages: list[float]
    between: list[Message]


def counted(told: Rehearsed, compiled: bool, norms: bool) -> Counted:
    """Convert a rehearsal to programs: the first step, and the sub-steps of the last one.

    ``norms``: whether one kernel computes an RMS norm.
    """
    patches = max(patch for _, patch in told.steps)
    last = max(step for step, patch in told.steps if patch == patches)
    first = [event for (step, _), events in told.steps.items() if step == 0 for event in events]
    steps = [program_of(events, compiled, norms) for (step, _), events in sorted(told.steps.items()) if step == last]
    parts = Parts({name: program_of(events, norms=norms) for name, events in told.parts.items()})
    return Counted(program_of(first, compiled, norms), steps, parts, told.stages, _between(first, told.stages))


def _between(events: list[Event], stages: list[float]) -> list[Message]:
    """The messages of a stage to the next in a step of the whole image; empty for one stage."""
    return [one for one in events if isinstance(one, Message) and one.operation == "send"] if len(stages) > 1 else []


@dataclass
class Estimate:
    """Seconds of a call and their breakdown; ``step``: seconds of a step in the steady state."""

    seconds: float = 0.0
    step: float = 0.0
    denoise: float = 0.0
    spent: Counter = field(default_factory=Counter)
    link: float = 0.0


def estimate(
    told: Counted, machine: Machine, steps: int, warmup: int, compiled: bool, fetched: float = 0.0
) -> Estimate:
    """Estimate a call of this many steps; with several stages, the first ``warmup`` of them are synchronous.

    ``fetched``: seconds per step to gather sharded weights, which overlaps with the computation.
    """
    found = Estimate()
    first = Clock(machine, compiled).run(told.first)
    each = [Clock(machine, compiled).run(program) for program in told.steps]
    busy, stages = sum(clock.device for clock in each), len(told.stages)
    found.link = sum(clock.link for clock in each)
    found.step = busy
    if stages > 1:
        hop, all_stages, slowest = sum(map(machine.link_seconds, told.between)), sum(told.stages), max(told.stages)
        synchronous = min(steps, max(1, warmup))  # two transformers have a warm-up each, maybe longer than the call
        patch, stale = busy / len(each), steps - synchronous
        found.step = max(slowest * busy, all_stages * patch + stages * hop / len(each))
        once, drain = all_stages * first.device + (stages - 1) * hop, (all_stages - slowest) * patch
        found.denoise = synchronous * once + drain + stale * found.step
        found.spent[BUBBLES] += synchronous * (all_stages - 1) * first.device + drain + stale * (slowest - 1) * busy
        found.spent[LINKS] += synchronous * (stages - 1) * hop + stale * (found.step - slowest * busy)
        _add(found.spent, first.spent, synchronous)
        for clock in each:
            _add(found.spent, clock.spent, stale)
    else:
        found.step = max(busy, fetched)
        found.denoise = max(first.device, fetched) + (steps - 1) * found.step
        found.spent[LINKS] += max(0.0, fetched - first.device) + (steps - 1) * max(0.0, fetched - busy)
        _add(found.spent, first.spent, 1)
        for clock in each:
            _add(found.spent, clock.spent, steps - 1)
    found.spent.update(told.parts.seconds(machine))
    found.spent[HOST] += machine.constants.call
    found.seconds = found.denoise + found.spent[VAE] + found.spent[TEXT] + machine.constants.call
    return found


def _add(total: Counter, spent: Counter, times: int) -> None:
    for name, seconds in spent.items():
        total[name] += seconds * times
