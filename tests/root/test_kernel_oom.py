"""T43, T55: the kernel ends a body that outgrows its memory, and the job says so. Real, in a cgroup of its own."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Host, host, wait_until

pytestmark = pytest.mark.root

LIMIT_BYTES = 300 << 20
_V1 = Path("/sys/fs/cgroup/memory")
_V2 = Path("/sys/fs/cgroup")

HEAD = """
import json, os, signal, sys
from remoted_client import *
from remoted_client import remote, CpuLiveServerless, CpuLiveLoadBalancer
queue = CpuLiveServerless(name="queue", workersMax=1)
direct = CpuLiveLoadBalancer(name="direct", workersMax=1)
beside = CpuLiveServerless(name="beside", workersMax=1)
def outgrow(procs):
    "Enter the small cgroup and touch memory until the kernel has enough."
    with open(procs, "w") as file: file.write(str(os.getpid()))
    held = []
    while len(held) < 1000: held.append(bytearray(os.urandom(1 << 20)))
    return "no limit was met"
@remote(queue, max_retries=0)
def hog(procs): return outgrow(procs)
@remote(direct)
def direct_hog(procs): return outgrow(procs)
@remote(queue, max_retries=0)
def pid(): return os.getpid()
@remote(beside, max_retries=0)
def neighbour(): return os.getpid()
procs = sys.argv[1]
"""


def _controller() -> tuple[Path, tuple[str, ...]]:
    """(where to make a cgroup, the files that take the limit, swap included)."""
    if (_V1 / "memory.limit_in_bytes").exists():
        swap = ("memory.memsw.limit_in_bytes",) if (_V1 / "memory.memsw.limit_in_bytes").exists() else ()
        return _V1, ("memory.limit_in_bytes", *swap)
    control = _V2 / "cgroup.subtree_control"
    if control.exists() and "memory" in control.read_text(encoding="ascii").split():
        return _V2, ("memory.max",)
    pytest.skip("NO MEMORY CONTROLLER, neither cgroup v1 nor v2: a kill by the kernel for want of memory was not tested")


@pytest.fixture
def small_cgroup() -> Iterator[Path]:
    """A memory cgroup with a small limit and no process; gone afterwards."""
    parent, files = _controller()
    folder = parent / f"remoted-test-{os.getpid()}"
    try:
        folder.mkdir()
    except OSError as error:
        pytest.skip(f"CANNOT MAKE A MEMORY CGROUP ({error}): a kill by the kernel for want of memory was not tested")
    try:
        for name in files:
            (folder / name).write_text(str(LIMIT_BYTES), encoding="ascii")
        if (folder / "memory.swap.max").exists():
            (folder / "memory.swap.max").write_text("0", encoding="ascii")
        yield folder
    finally:
        wait_until(lambda: _removed(folder), 20, lambda: f"processes stay in the cgroup: {(folder / 'cgroup.procs').read_text()}")


def _removed(folder: Path) -> bool:
    try:
        folder.rmdir()
    except OSError:
        return not folder.exists()
    return True


@pytest.fixture
def daemon(small_cgroup: Path) -> Iterator[Host]:
    """Ends before the cgroup is removed."""
    with host() as made:
        yield made.start()


def test_t43_a_body_that_the_kernel_kills_for_its_memory_is_oom_and_its_neighbours_live(daemon: Host, small_cgroup: Path) -> None:
    found = daemon.run(
        HEAD
        + """
before = neighbour().result().output
out = hog(procs).result()
print(json.dumps([[out.status, out.state_reason, out.error], before == neighbour().result().output, pid().result().status]))
""",
        str(small_cgroup / "cgroup.procs"),
    ).json

    (status, reason, error), neighbour_lives, next_call = found
    assert (status, reason) == ("FAILED", "OOM_RAM")
    assert "SIGKILL" in error
    assert "the kernel was out of memory" in error
    assert neighbour_lives
    assert next_call == "COMPLETED"


def test_t43_a_direct_call_that_the_kernel_kills_for_its_memory_is_lost_with_that_reason(daemon: Host, small_cgroup: Path) -> None:
    reason, text = daemon.run(
        HEAD
        + """
try: direct_hog(procs).result()
except WorkerLost as error: print(json.dumps([error.reason, str(error)]))
""",
        str(small_cgroup / "cgroup.procs"),
    ).json

    assert reason == "OOM_RAM"
    assert "the kernel was out of memory" in text


def test_t55_a_kill_by_hand_is_no_want_of_memory(daemon: Host, small_cgroup: Path) -> None:
    reason = daemon.run(
        HEAD
        + """
@remote(queue, max_retries=0)
def die(): os.kill(os.getpid(), signal.SIGKILL)
hog(procs).result()
print(json.dumps(die().result().state_reason))
""",
        str(small_cgroup / "cgroup.procs"),
    ).json

    assert reason == "WORKER_DIED"


def test_t55_a_kill_by_hand_of_a_worker_older_than_somebody_elses_want_of_memory(daemon: Host, small_cgroup: Path) -> None:
    found = daemon.run(
        HEAD
        + """
@remote(beside, max_retries=0)
def die(): os.kill(os.getpid(), signal.SIGKILL)
neighbour().result()
print(json.dumps([hog(procs).result().state_reason, die().result().state_reason]))
""",
        str(small_cgroup / "cgroup.procs"),
    ).json

    assert found == ["OOM_RAM", "WORKER_DIED"]
