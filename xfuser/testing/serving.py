"""A server for tests: ``xdit serve`` as a user starts it, on its own port."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).parent.parent.parent
OF_RANKS = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
PATIENCE = 180  # seconds; ranks start slowly on a busy machine


def until(look: Callable[[], Any], what: str, patience: float = PATIENCE) -> Any:
    """Return the first true value of ``look()``; raise an AssertionError that names ``what`` on timeout."""
    deadline = time.monotonic() + patience
    while time.monotonic() < deadline:
        if found := look():
            return found
        time.sleep(0.05)
    raise AssertionError(f"timeout after {patience} s: {what}")


class Served:
    """A running `xdit serve`; ``url`` is its address."""

    def __init__(self, folder: str | Path, *flags: Any) -> None:
        environment = {
            name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")
        }
        environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        command = [sys.executable, "-m", "xfuser.cli", "serve", "--port", "0", *map(str, flags)]
        self.log = Path(folder) / "serve.log"
        with self.log.open("w") as log:
            self.process = subprocess.Popen(command, cwd=folder, env=environment, stdout=log, stderr=log)
        line = until(lambda: self._line() or self.process.poll(), "the server's first line")
        assert isinstance(line, str), self.log.read_text()
        self.url = line.split()[2]

    def _line(self) -> str | None:
        return next((line for line in self.log.read_text().splitlines() if line.startswith("xdit serve: http")), None)

    def health(self) -> dict[str, Any]:
        """Return the response of ``/health``."""
        try:
            with urllib.request.urlopen(f"{self.url}/health") as answer:
                return json.load(answer)
        except urllib.error.HTTPError as error:
            return json.load(error)
        except urllib.error.URLError:
            return {"ready": False}

    def ready(self) -> "Served":
        """Wait until the server is ready, and return it."""
        until(lambda: self.process.poll() is not None or self.health()["ready"], "a ready server")
        assert self.process.poll() is None, self.log.read_text()
        return self

    def ranks(self) -> list[int]:
        """Return the process ids of the ranks, which are forked from a process that the server starts."""
        found = []
        for fork in psutil.Process(self.process.pid).children():
            with suppress(psutil.Error):  # the process has just ended
                found += [child.pid for child in fork.children()]
        return sorted(found)

    def metric(self, name: str) -> float:
        """Return a value of ``/metrics``; 0 if it does not exist yet."""
        with urllib.request.urlopen(f"{self.url}/metrics") as answer:
            lines = answer.read().decode().splitlines()
        return float(next((line.split()[-1] for line in lines if line.startswith(f"{name} ")), 0))

    def interrupt(self) -> float:
        """Send Ctrl-C, and return the seconds until the server and all ranks have ended."""
        ranks, start = [psutil.Process(pid) for pid in self.ranks()], time.monotonic()
        self.process.send_signal(signal.SIGINT)
        self.process.wait(PATIENCE)
        until(lambda: not any(rank.is_running() for rank in ranks), "the ranks' end")
        return time.monotonic() - start
