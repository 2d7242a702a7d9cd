"""Machines: the figures of their data sheets, and a few constants for how much of these is reached."""

import difflib
import json
import os
import re
from dataclasses import asdict, dataclass, fields, replace
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from xfuser.core import device as devices
from xfuser.planner.trace import CACHES, Message

if TYPE_CHECKING:
    from xfuser.planner.cost import Operators

FILE = Path(__file__).with_name("machines.json")
NODE = 8  # devices per node
CACHED = 32  # bytes per cycle that a processor gets from the cache
KINDS = {"pcie": 32e9, "nvlink": 300e9}  # kinds of links, and their usual one-way bytes per second
HEADS = 32  # attention kernels exist for head sizes that are multiples of this; other sizes are padded
EXPS = 16  # exponentials per cycle that a processor computes
KERNEL = 3e-6  # seconds to start and end a GPU's kernel
COMPILED = 1 / 6  # host time per operator in compiled code, relative to eager mode
TF32 = 0.5  # speed of convolutions in 32 bits, relative to 16: by default, torch rounds their inputs, but not products'
BETWEEN_NODES = 2  # time until a message starts between nodes, relative to within a node


@dataclass(frozen=True)
class Constants:
    """Eight figures for the performance that a kind of machine reaches.

    Attributes:
        matmul: FLOPs per joule of matrix products at the full clock. Where the peak requires more than the card's
            power, the clock falls with the cube root of the ratio, as power grows with the cube of the clock (the
            voltage follows the clock).
        attention: the work on one attention score, besides the products, in exponentials.
        convolution: the speed of convolutions relative to matrix products.
        memory, link: reached fractions of the memory bandwidth, and of a link's one-way bandwidth.
        host: host seconds per operator in eager mode.
        start: seconds from the issue of a message to its first byte.
        call: host seconds per call besides its operators: tokenizers, conversion of images, loading of kernels on
            first use.
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
    """A kind of device, in nodes.

    Attributes:
        peak: FLOP/s of dense matrix products in 16 bits; ``wide``: the fraction of it in 32 bits, without TF32.
        units, clock: number of processors, each of which computes one tile of a matrix product at a time, and their
            cycles per second.
        cache: bytes of the cache that the processors share.
        bandwidth: bytes per second of the memory; ``memory``: its size in bytes as the driver tells it, None if all
            ranks share it.
        link, node_link: one-way bytes per second of a device within its node, and of a node to other nodes.
        kernels: the fraction of the peak that the attention kernels' instructions can reach; ``overlaps``: whether
            these kernels compute products and exponentials at the same time.
        power: the card's power limit in watts.
        exps: exponentials per cycle of attention kernels and activations, as a multiple of :data:`EXPS`.
        kernel: seconds until an operator's first blocks run and after its last ones end, besides its work.
        synchronous: whether the host itself computes (a CPU).
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
    kernel: float = 0.0
    synchronous: bool = False

    @property
    def cycles(self) -> float:
        """Cycles per second of all processors."""
        return self.units * self.clock

    @property
    def reached(self) -> float:
        """The fraction of the full clock at which matrix products run within the card's power."""
        return min(1.0, (self.constants.matmul * self.power / self.peak) ** (1 / 3))

    @property
    def norms(self) -> bool:
        """Whether one kernel computes an RMS norm, as on GPUs since torch 2.9."""
        return not self.synchronous and hasattr(torch.ops.aten, "_fused_rms_norm")

    @property
    def cache_column(self) -> int:
        """The column of :data:`CACHES` with the largest size that is not above the machine's cache."""
        return max(i for i, size in enumerate(CACHES) if size <= self.cache / 1e6)

    def host_seconds(self, compiled: bool) -> float:
        """Host seconds of one operator."""
        return self.constants.host * (COMPILED if compiled else 1.0)

    def seconds(self, run: "Operators") -> np.ndarray:
        """Device seconds of each operator: its start, and the longer of its arithmetic and its memory traffic."""
        wide = np.where(run.convolutions > 0, max(self.wide, TF32), self.wide)
        known, peak = self.constants, self.peak * np.where(run.wide > 0, wide, 1.0)
        moved = np.maximum(
            run.missed[:, self.cache_column] / (known.memory * self.bandwidth), run.bytes / (CACHED * self.cycles)
        )
        waves = np.ceil(run.tiles / self.units) * self.units
        idle = np.where(run.tiles > 0, waves / np.maximum(run.tiles, 1), 1.0)
        products = run.flops * idle / (peak * self.reached * np.where(run.convolutions > 0, known.convolution, 1.0))
        sizes = np.maximum(run.flops / np.maximum(4 * run.scores, 1), 1)  # head sizes
        padded = run.flops * np.ceil(sizes / HEADS) * HEADS / sizes
        products_of, exponentials = padded / (peak * self.kernels), run.scores / (EXPS * self.exps * self.cycles)
        others = exponentials * known.attention
        attention = np.maximum(products_of, others) if self.overlaps else products_of + others
        arithmetic = np.select([run.kinds == 0, run.kinds == 1], [products, attention], exponentials)
        return np.maximum(arithmetic, moved) + self.kernel

    def link_seconds(self, message: Message) -> float:
        """Seconds of a message, from its issue to its end."""
        here = [rank // self.node for rank in message.ranks]
        local = max(here.count(node) for node in set(here))
        if local == len(here):
            return self.constants.start + message.sent / (self.constants.link * self.link)
        total = len(here)
        if message.operation == "all_to_all":  # each rank of a node sends to all ranks of other nodes
            crossing = message.sent * (total - local) / (total - 1) * min(self.node, local * (self.node // local))
        else:  # in a ring, one rank of each group sends to another node
            crossing = message.sent * (self.node // local)
        return self.constants.start * BETWEEN_NODES + crossing / (self.constants.link * self.node_link)


@cache
def shipped() -> dict[str, Any]:
    """Load ``machines.json``: data sheets by name, and constants by kind of links."""
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
    """Return the machine of this name, as calibrated here or from its data sheet.

    Args:
        links: pcie, nvlink, or a rate such as 200gbit; defaults to the links of the data sheet.
        node: devices per node; ``node_link``: one-way bytes per second between nodes.
        constants: by kind of links, instead of the shipped ones; ``kernels``: instead of the data sheet's, if any.
        newest: whether attention uses kernels of the device's own generation, where older kernels are usual.

    Raises:
        ValueError: the machine is unknown.
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
    """Find the data sheet of a device by its name here or its driver's name ("NVIDIA A100-SXM4-40GB"); None if unknown.

    Of the data sheets whose words all occur in the name, the longest is returned. "L40S" does not contain the word
    "L40", nor "A1000" the word "A100".
    """
    text = re.sub(r"[^a-z0-9]+", " ", name.lower())
    found = [one for one in shipped()["machines"] if all(re.search(word, text) for word in _words(one))]
    return max(found, key=len, default=None)


def _words(name: str) -> list[str]:
    """The words of a name as patterns, without RTX; a space may stand between digits and letters."""
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
            + (f" (similar: {', '.join(known[one] for one in near)})" if near else "")
            + ". To measure this machine instead, run once: xdit plan --calibrate"
        )
    sheet = sheets[found]
    kind = links if links in KINDS else sheet["links"]
    link = sheet["link_gb_s"] * 1e9 if kind == sheet["links"] else KINDS[kind]
    reached = (constants or constants_of())[kind]
    held = sheet["memory_gib"] and int(sheet["memory_gib"] * 2**30)
    more = {name: sheet[name] for name in ("kernels", "power", "exps", "wide", "synchronous") if name in sheet}
    return Machine(
        name=found, peak=sheet["peak_tflops"] * 1e12, units=sheet["units"], clock=sheet["gigahertz"] * 1e9,
        cache=sheet["cache_mb"] * 1e6, bandwidth=sheet["memory_gb_s"] * 1e9, memory=held,
        link=link, constants=reached, kernel=0.0 if "synchronous" in sheet else KERNEL, **more,
    )  # fmt: skip


def constants_of() -> dict[str, Constants]:
    """The shipped constants by kind of links."""
    return {kind: Constants(**values) for kind, values in shipped()["constants"].items()}


def links_of(name: str) -> tuple[float, float] | None:
    """Seconds until a message starts, and bytes per second after that, by the data sheet of a device; None without."""
    if sheet_of(name) is None:
        return None
    sheet = _of_sheet(name, None, None)
    return sheet.constants.start, sheet.constants.link * sheet.link


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower().replace("geforce", ""))


def in_bytes_a_second(rate: str) -> float:
    """Convert ``"100gbit"`` or ``"64GB"`` to bytes per second.

    Raises:
        ValueError: the text is not a rate.
    """
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([kmgt])(bit|b)(?:/s|ps)?", rate.strip().lower())
    if not found or not float(found[1]):
        raise ValueError(
            f"{rate!r} is not a rate of a link: give {', '.join(KINDS)}, or a rate such as 100gbit or 64GB"
        )
    number, unit, what = found.groups()
    return float(number) * 1000 ** (" kmgt".index(unit)) / (8 if what == "bit" else 1)


def devices_of(spec: str) -> tuple[int, str]:
    """Split ``"8xL40"`` into a number and a name; without a number, it is 1.

    Raises:
        ValueError: the number is 0 or behind the name, or there is no name.
    """
    found = re.fullmatch(r"(?:(\d+) ?[xX] ?)?(.+)", spec.strip())
    count = int(found[1] or 1) if found else 0
    if count < 1 or re.search(r"\d ?x\d+$", found[2].lower()):  # "H100x4"
        raise ValueError(f"gpus={spec!r}: give a number and a name, such as 8xL40")
    return count, found[2]


def cache_folder() -> Path:
    """Folder of calibrated machines, in ``XFUSER_CACHE`` or in ``xfuser`` in the user's cache folder."""
    base = os.environ.get("XDG_CACHE_HOME") or os.path.join(os.path.expanduser("~"), ".cache")
    return Path(os.environ.get("XFUSER_CACHE") or os.path.join(base, "xfuser")) / "machines"


def calibrated(name: str | None = None) -> Machine | None:
    """The machine of this name as calibrated here with this version's constants; None if it was not."""
    path = cache_folder() / f"{_plain(name or devices.device_name())}.json"
    if not path.is_file():
        return None
    with open(path, encoding="utf-8") as file:
        kept = json.load(file)
    if kept["constants"].keys() != {one.name for one in fields(Constants)}:
        return None  # measured by another version
    return Machine(**kept | {"constants": Constants(**kept["constants"])})


def keep(machine: Machine) -> Path:
    """Write a calibrated machine to the cache folder, and return its file."""
    path = cache_folder() / f"{_plain(machine.name)}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(machine), indent=1) + "\n", encoding="utf-8")
    return path
