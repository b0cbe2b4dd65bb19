"""A daemon of the run's own, and the remote functions that are measured."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil

from benchmarks import bodies
from tests.harness import Host


class BenchHost(Host):
    """As in the tests, but with bytecode files and default warnings, as a user has them."""

    @property
    def environ(self) -> dict[str, str]:
        found = super().environ
        for name in ("PYTHONDONTWRITEBYTECODE", "PYTHONWARNINGS"):
            found.pop(name, None)
        return found

    @property
    def process_of_daemon(self) -> psutil.Process:
        assert self.process is not None
        return psutil.Process(self.process.pid)


@contextlib.contextmanager
def daemon() -> Iterator[BenchHost]:
    """A daemon in empty folders; this process becomes its client, and is as before afterwards."""
    folder = Path(tempfile.mkdtemp(prefix="rmt-"))
    before = dict(os.environ)
    host = BenchHost(folder / "h")
    try:
        os.environ.update(host.environ)
        yield host.start()  # type: ignore[misc]
    finally:
        host.close()
        os.environ.clear()
        os.environ.update(before)
        shutil.rmtree(folder, ignore_errors=True)


class Functions:
    """Remote functions on one worker each; ``cold`` makes one on a pool that never was."""

    def __init__(self) -> None:
        from remoted_client import CpuLiveLoadBalancer, CpuLiveServerless

        self._classes: dict[str, Any] = {"direct": CpuLiveLoadBalancer, "queue": CpuLiveServerless}
        self._pools = 0

    def on(self, kind: str, body: Any, *, name: str = "", **options: Any) -> Any:
        """``body`` on the warm pool of ``direct`` or ``queue``."""
        from remoted_client import remote

        config = self._classes[kind](name=name or f"bench-{kind}", workersMax=1, **options)
        return remote(config)(body)

    def cold(self, kind: str, body: Any = bodies.noop, **options: Any) -> Any:
        """Its worker does not exist yet; it leaves soon after its call."""
        self._pools += 1
        return self.on(kind, body, name=f"cold-{kind}-{self._pools}", idleTimeout=1, **options)


def unwrap(result: Any) -> Any:
    """The value, of either kind; a failed job ends the run."""
    return result.unwrap() if hasattr(result, "unwrap") else result


def cpu_seconds(process: psutil.Process) -> float:
    """CPU time of all its threads, in nanoseconds' resolution where the kernel keeps it; clock ticks are too coarse here."""
    total = 0
    with contextlib.suppress(OSError, ValueError):
        for thread in Path(f"/proc/{process.pid}/task").iterdir():
            total += int((thread / "schedstat").read_text(encoding="ascii").split()[0])
    if total:
        return total / 1e9
    times = process.cpu_times()
    return float(times.user + times.system)
