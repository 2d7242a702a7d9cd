"""The seconds of a whole call: text encoders, all steps, and the VAE."""

from collections import Counter
from dataclasses import dataclass, field

from xfuser.planner.cost import BUBBLES, HOST, LINKS, TEXT, VAE, Clock, Program, program_of
from xfuser.planner.machines import Machine
from xfuser.planner.rehearsal import Rehearsed
from xfuser.planner.trace import Event, Message
from xfuser.weights.text_encoders import PREFIX


class Parts:
    """What is computed once a call, beside the steps: the programs of components by their names."""

    def __init__(self, programs: dict[str, Program]) -> None:
        self._programs = programs
        self._known: dict[Machine, Counter] = {}

    def seconds(self, machine: Machine) -> Counter:
        """Of the text encoders, and of all else."""
        if machine not in self._known:
            self._known = {machine: Counter()}
            for name, program in self._programs.items():
                kind = TEXT if name.startswith(PREFIX) else VAE
                self._known[machine][kind] += Clock(machine).run(program).device
        return self._known[machine]


@dataclass
class Counted:
    """A rehearsal as programs: what an estimate needs of it, for any machine.

    Attributes:
        first, steps: of the first step, and of each sub-step of the last one that is asynchronous.
        stages: what PipeFusion's stages compute, by what the first one does, which is the one that is counted.
        sent: bytes between two stages for each of the steps, and the message itself.
    """

    first: Program
    steps: list[Program]
    parts: Parts
    stages: list[float]
    between: list[Message]


def counted(told: Rehearsed, compiled: bool) -> Counted:
    """The programs of what was rehearsed: those of the first step, and of the sub-steps of the last one."""
    patches = max(patch for _, patch in told.steps)
    last = max(step for step, patch in told.steps if patch == patches)
    first = [event for (step, _), events in told.steps.items() if step == 0 for event in events]
    steps = [program_of(events, compiled) for (step, _), events in sorted(told.steps.items()) if step == last]
    parts = Parts({name: program_of(events) for name, events in told.parts.items()})
    return Counted(program_of(first, compiled), steps, parts, told.stages, _between(first, told.stages))


def _between(events: list[Event], stages: list[float]) -> list[Message]:
    """What a stage sends to the next in a step of the whole image."""
    return [one for one in events if isinstance(one, Message) and one.operation == "send"] if len(stages) > 1 else []


@dataclass
class Estimate:
    """Seconds of a call, and where they go; ``step`` of one step among many."""

    seconds: float = 0.0
    step: float = 0.0
    denoise: float = 0.0
    spent: Counter = field(default_factory=Counter)
    link: float = 0.0


def estimate(
    told: Counted, machine: Machine, steps: int, warmup: int, compiled: bool, fetched: float = 0.0
) -> Estimate:
    """Of a call with so many steps, the first ``warmup`` of which are synchronous where there are stages.

    ``fetched`` are the seconds in which sharded weights travel in a step, behind the computation.
    """
    found = Estimate()
    first = Clock(machine, compiled).run(told.first)
    each = [Clock(machine, compiled).run(program) for program in told.steps]
    busy, stages = sum(clock.device for clock in each), len(told.stages)
    found.link = sum(clock.link for clock in each)
    found.step = busy
    if stages > 1:
        hop, all_stages, slowest = sum(map(machine.link_seconds, told.between)), sum(told.stages), max(told.stages)
        patch, stale, synchronous = busy / len(each), max(0, steps - max(1, warmup)), max(1, warmup)
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
