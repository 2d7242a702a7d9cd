"""Machines: what their data sheets say, and the few constants that say how much of it is reached."""

import difflib
import json
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from xfuser.core import device as devices
from xfuser.planner.trace import CACHES, Message

if TYPE_CHECKING:
    from xfuser.planner.cost import Operators

FILE = Path(__file__).with_name("machines.json")
NODE = 8  # devices in a node
CACHED = 32  # bytes that a processor gets from the cache in a cycle
KINDS = {"pcie": 32e9, "nvlink": 300e9}  # of links, and their usual bytes a second, one way
HEADS = 32  # of sizes that are multiples of it, attention kernels are made; others are padded
EXPS = 16  # exponentials that a processor computes in a cycle
COMPILED = 1 / 6  # of the host's time for an operator, to issue it from compiled code
BETWEEN_NODES = 2  # times as long as within a node until a message begins


@dataclass(frozen=True)
class Constants:
    """What a kind of machine reaches: eight figures.

    Attributes:
        matmul: FLOPs a joule of products at the full clock; where the peak takes more than the card's power, the clock
            follows the cube root of it, as power grows with the cube of the clock (its voltage follows it).
        attention: exponentials that the work on one score of an attention, beside its products, is worth.
        convolution: the share of the speed of matrix products that convolutions reach.
        memory, link: fractions of the memory's bandwidth, and of a link's one way.
        host: seconds of the host for an operator, run one by one.
        start: seconds from the issue of a message to its first byte.
        call: seconds of the host for a call beside its operators: tokenizers, conversion of images, kernels that are
            loaded when they are first used.
    """

    matmul: float
    attention: float
    convolution: float
    memory: float
    link: float
    host: float
    start: float
    call: float


@dataclass(frozen=True)
class Machine:
    """A kind of device in nodes.

    Attributes:
        peak: FLOP/s of dense matrix products in 16 bits; in 32 bits it is ``wide`` of that.
        units, clock: processors that compute one tile of a matrix product at a time each, and their cycles a second.
        cache: bytes of the cache that they share.
        bandwidth: bytes a second of its memory; ``memory`` bytes that it has, None if all ranks share it.
        link, node_link: bytes a second one way, of a device within its node, and of a node to others.
        kernels: the share of the peak that the instructions of the attention kernels have; ``overlaps``: whether they
            compute products and exponentials at the same time.
        power: watts that the card may take.
        exps: how many times :data:`EXPS` exponentials its attention kernels, or its activations, compute in a cycle.
        synchronous: whether the host itself computes: a CPU.
    """

    name: str
    peak: float
    units: int
    clock: float
    cache: float
    bandwidth: float
    memory: int | None
    link: float
    constants: Constants
    kernels: float = 1.0
    power: float = 1.0
    exps: float = 1.0
    overlaps: bool = False
    wide: float = 0.5
    node: int = NODE
    node_link: float = 12.5e9
    synchronous: bool = False

    @property
    def cycles(self) -> float:
        """Of all processors in a second."""
        return self.units * self.clock

    @property
    def reached(self) -> float:
        """The share of the full clock that matrix products run at within the card's power."""
        return min(1.0, (self.constants.matmul * self.power / self.peak) ** (1 / 3))

    @property
    def cache_column(self) -> int:
        """The column of :data:`CACHES` with the largest size that the machine's cache has."""
        return max(i for i, size in enumerate(CACHES) if size <= self.cache / 1e6)

    def host_seconds(self, compiled: bool) -> float:
        """Of one operator."""
        return self.constants.host * (COMPILED if compiled else 1.0)

    def seconds(self, run: "Operators") -> np.ndarray:
        """Of the device, for each operator: what takes longer, its arithmetic or its bytes."""
        known, peak = self.constants, self.peak * np.where(run.wide > 0, self.wide, 1.0)
        moved = np.maximum(
            run.missed[:, self.cache_column] / (known.memory * self.bandwidth), run.bytes / (CACHED * self.cycles)
        )
        waves = np.ceil(run.tiles / self.units) * self.units
        idle = np.where(run.tiles > 0, waves / np.maximum(run.tiles, 1), 1.0)
        products = run.flops * idle / (peak * self.reached * np.where(run.convolutions > 0, known.convolution, 1.0))
        sizes = np.maximum(run.flops / np.maximum(4 * run.scores, 1), 1)  # of a head
        padded = run.flops * np.ceil(sizes / HEADS) * HEADS / sizes
        products_of, exponentials = padded / (peak * self.kernels), run.scores / (EXPS * self.exps * self.cycles)
        others = exponentials * known.attention
        attention = np.maximum(products_of, others) if self.overlaps else products_of + others
        arithmetic = np.select([run.kinds == 0, run.kinds == 1], [products, attention], exponentials)
        return np.maximum(arithmetic, moved)

    def link_seconds(self, message: Message) -> float:
        """Of a message, from its issue to its end."""
        here = [rank // self.node for rank in message.ranks]
        local = max(here.count(node) for node in set(here))
        if local == len(here):
            return self.constants.start + message.sent / (self.constants.link * self.link)
        total = len(here)
        if message.operation == "all_to_all":  # all ranks of a node send to all others
            crossing = message.sent * (total - local) / (total - 1) * min(self.node, local * (self.node // local))
        else:  # around the ring, one of them does, for each group
            crossing = message.sent * (self.node // local)
        return self.constants.start * BETWEEN_NODES + crossing / (self.constants.link * self.node_link)


@cache
def shipped() -> dict[str, Any]:
    """``machines.json``: data sheets by name, and constants by kind of links."""
    with open(FILE, encoding="utf-8") as file:
        return json.load(file)


def machine_of(
    name: str,
    links: str | None = None,
    node: int = NODE,
    node_link: float | None = None,
    constants: dict[str, Constants] | None = None,
    kernels: float | None = None,
    newest: bool = False,
) -> Machine:
    """The machine of this name: one that was calibrated here, or one of the data sheets.

    Args:
        links: pcie, nvlink, or a rate such as 200gbit; those of the data sheet if not given.
        node: devices in a node; ``node_link``: bytes a second between nodes, one way.
        constants: by kind of links, and kernels, where the data sheet has some: in the place of those that are shipped.
        newest: whether attention runs on kernels of the device's own generation, where others are usual.

    Raises:
        ValueError: nothing is known of it.
    """
    own = None if constants else calibrated(name)
    machine = own or _of_sheet(name, links, constants)
    if kernels and machine.kernels != 1.0:
        machine = replace(machine, kernels=kernels)
    if newest:
        machine = replace(machine, kernels=1.0, overlaps=True)
    if links and links not in KINDS:
        machine = replace(machine, link=in_bytes_a_second(links))
    return replace(machine, node=node, node_link=node_link or machine.node_link)


def sheet_of(name: str) -> str | None:
    """The data sheet of a device, by its name here or as its driver tells it ("NVIDIA A100-SXM4-40GB"): of those whose
    words the name has, the longest. A word that goes on ("L40S", "A1000") is another one; None where there is none.
    """
    text = re.sub(r"[^a-z0-9]+", " ", name.lower())
    found = [one for one in shipped()["machines"] if all(re.search(word, text) for word in _words(one))]
    return max(found, key=len, default=None)


def _words(name: str) -> list[str]:
    """As patterns, without RTX; a space may stand between digits and letters."""
    words = re.findall(r"[a-z0-9]+", name.lower().removeprefix("rtx "))
    ends = (r"(?!\d|[a-z]\b)" if word[-1].isdigit() else r"(?![a-z])" for word in words)
    return [re.sub(r"(?<=\d)(?=[a-z])", " ?", word) + end for word, end in zip(words, ends, strict=True)]


def _of_sheet(name: str, links: str | None, constants: dict[str, Constants] | None) -> Machine:
    sheets, found = shipped()["machines"], sheet_of(name)
    if found is None:
        known = {_plain(one): one for one in sheets}
        near = difflib.get_close_matches(_plain(name), known, 3)
        raise ValueError(
            f"gpus={name!r} is unknown: known are {', '.join(sheets)}"
            + (f" (near it: {', '.join(known[one] for one in near)})" if near else "")
            + ". On the machine itself, measure it once: xdit plan --calibrate"
        )
    sheet = sheets[found]
    kind = links if links in KINDS else sheet["links"]
    link = sheet["link_gb_s"] * 1e9 if kind == sheet["links"] else KINDS[kind]
    reached = (constants or constants_of())[kind]
    held = sheet["memory_gib"] and sheet["memory_gib"] * 2**30
    more = {name: sheet[name] for name in ("kernels", "power", "exps", "wide", "synchronous") if name in sheet}
    return Machine(
        name=found, peak=sheet["peak_tflops"] * 1e12, units=sheet["units"], clock=sheet["gigahertz"] * 1e9,
        cache=sheet["cache_mb"] * 1e6, bandwidth=sheet["memory_gb_s"] * 1e9, memory=held,
        link=link, constants=reached, **more,
    )  # fmt: skip


def constants_of() -> dict[str, Constants]:
    """The constants that are shipped, by kind of links."""
    return {kind: Constants(**values) for kind, values in shipped()["constants"].items()}


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("geforce", ""))


def in_bytes_a_second(rate: str) -> float:
    """``"100gbit"`` or ``"64GB"`` as bytes a second.

    Raises:
        ValueError: it is not a rate.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt])(bit|b)(?:/s|ps)?", rate.strip().lower())
    if not found or not float(found[1]):
        raise ValueError(
            f"{rate!r} is not a rate of a link: give {', '.join(KINDS)}, or a number such as 100gbit or 64GB"
        )
    number, unit, what = found.groups()
    return float(number) * 1000 ** (" kmgt".index(unit)) / (8 if what == "bit" else 1)


def devices_of(spec: str) -> tuple[int, str]:
    """``"8xL40"`` as a number and a name; a name alone is one.

    Raises:
        ValueError: the number is none.
    """
    found = re.fullmatch(r"(?:(\d+) ?[xX] ?)?(.+)", spec.strip())
    count = int(found[1] or 1) if found else 0
    if count < 1:
        raise ValueError(f"gpus={spec!r}: give a number and a name, such as 8xL40")
    return count, found[2]


def cache_folder() -> Path:
    """Where calibrated machines are kept: ``XFUSER_CACHE``, or ``xfuser`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("XFUSER_CACHE") or os.path.join(base, "xfuser")) / "machines"


def calibrated(name: str | None = None) -> Machine | None:
    """The machine of this name that was calibrated here, by this version's constants; None where none was."""
    path = cache_folder() / f"{_plain(name or devices.device_name())}.json"
    if not path.is_file():
        return None
    with open(path, encoding="utf-8") as file:
        kept = json.load(file)
    if kept["constants"].keys() != {one.name for one in fields(Constants)}:
        return None  # measured by another version
    return Machine(**kept | {"constants": Constants(**kept["constants"])})


def keep(machine: Machine) -> Path:
    """Write a calibrated machine into the cache folder; returns its file."""
    path = cache_folder() / f"{_plain(machine.name)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(machine), indent=1) + "\n", encoding="utf-8")
    return path
