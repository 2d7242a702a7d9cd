"""Two nodes on one machine: network namespaces connected by a link of a given rate (Linux, as root)."""

import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

PORT = 29500
LEAST_BURST = 128 * 1024  # bytes: two of the largest packets that a virtual link carries
UNITS = {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}
PATIENCE = 10  # seconds for processes to end after a request


@dataclass(frozen=True)
class Node:
    """A network namespace and its end of the link."""

    namespace: str
    interface: str
    address: str

    def run(self, *command: str) -> None:
        """Run a command on this node and wait for its end."""
        _run("ip", "netns", "exec", self.namespace, *command)

    def start(self, *command: str, **options: object) -> subprocess.Popen:
        """Start a program on this node, with gloo on the link."""
        environment = os.environ | {
            "GLOO_SOCKET_IFNAME": self.interface,
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }  # hides warnings: no name resolution here
        return subprocess.Popen(["ip", "netns", "exec", self.namespace, *command], env=environment, **options)

    def kill(self) -> None:
        """Kill all processes on this node at once, as in a power failure."""
        told = subprocess.run(["ip", "netns", "pids", self.namespace], capture_output=True, text=True)
        for process in told.stdout.split():
            try:
                os.kill(int(process), signal.SIGKILL)
            except ProcessLookupError:
                continue


def check_nodes() -> None:
    """Raise a ValueError if nodes cannot be created."""
    missing = [program for program in ("ip", "tc") if not shutil.which(program)]
    if missing:
        raise ValueError(f"nodes on one machine need {' and '.join(missing)}: install iproute2 (Linux)")
    if os.geteuid() != 0:
        raise ValueError("nodes on one machine are network namespaces, which need root: run this as root")


def bits_per_second(rate: str) -> float:
    """Parse a rate in the notation of ``tc``; raises a ValueError for any other text."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(kbit|mbit|gbit)", rate)
    if not found or not float(found[1]):
        raise ValueError(f"rate={rate!r}: write a number and {', '.join(UNITS)}, such as 100mbit")
    return float(found[1]) * UNITS[found[2]]


@contextmanager
def two_nodes(rate: str, delay: str | None = None) -> Iterator[tuple[Node, Node]]:
    """Context with two namespaces that are connected only to each other, by a link of ``rate`` each way.

    On exit, they are removed and their processes are killed. ``delay`` (such as ``1ms``) applies to each way, and
    requires the kernel's ``netem``.
    """
    check_nodes()
    own = os.getpid()
    first, second = (Node(f"xdit-{own}-{end}", f"xdit{own}-{end}", f"10.77.0.{end + 1}") for end in (0, 1))
    try:
        for node in (first, second):
            _run("ip", "netns", "add", node.namespace)
        ends = ["ip", "link", "add", first.interface, "netns", first.namespace, "type", "veth"]
        _run(*ends, "peer", "name", second.interface, "netns", second.namespace)
        for node in (first, second):
            node.run("ip", "addr", "add", f"{node.address}/24", "dev", node.interface)
            for interface in ("lo", node.interface):
                node.run("ip", "link", "set", interface, "up")
            _limit(node, rate, delay)
        yield first, second
    finally:
        for node in (first, second):
            node.kill()
            subprocess.run(["ip", "netns", "del", node.namespace], capture_output=True)  # with its end of the link


def _limit(node: Node, rate: str, delay: str | None) -> None:
    """Limit the traffic that leaves the node by a delay and a token bucket of 2 ms."""
    parent = ["root"]
    if delay:
        node.run("tc", "qdisc", "add", "dev", node.interface, "root", "handle", "1:", "netem", "delay", delay)
        parent = ["parent", "1:"]
    burst = max(LEAST_BURST, int(bits_per_second(rate) / 8 * 0.002))
    bucket = ["tbf", "rate", rate, "burst", str(burst), "latency", "200ms"]
    node.run("tc", "qdisc", "add", "dev", node.interface, *parent, *bucket)


def torchrun(nodes: tuple[Node, Node], ranks: int, *command: str, **options: object) -> list[subprocess.Popen]:
    """Start ``command`` (the arguments after torchrun's own flags) on ``ranks`` ranks of each node."""
    flags = [f"--nnodes={len(nodes)}", f"--nproc_per_node={ranks}", "--max_restarts=0", "--monitor_interval=0.1"]
    flags += [f"--master_addr={nodes[0].address}", f"--master_port={PORT}"]
    launcher = [sys.executable, "-m", "torch.distributed.run", *flags]
    return [node.start(*launcher, f"--node_rank={place}", *command, **options) for place, node in enumerate(nodes)]


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{' '.join(command)} failed: {done.stderr.strip()}")
