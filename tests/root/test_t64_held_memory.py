"""T64: processes whose memory map is held for ever, by a thread in mmap(2) of a file of their own: who reads their environment waits."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.harness import wait_until
from tests.root.system_host import SystemHost, system_host

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]
_SERVER = Path(__file__).with_name("silent_files.py")
HEAD = """
import ctypes, json, mmap, os, sys, threading, time
from pathlib import Path
from remoted_client import CpuLiveServerless, remote
def map(fd, may, how):
    call = ctypes.CDLL(None).mmap
    call.restype = ctypes.c_void_p
    return call(None, ctypes.c_size_t(4096), may, how, fd, ctypes.c_long(0))
def hold(file, pid):
    Path(pid).write_text(str(os.getpid()))
    cached, direct = os.open(file, os.O_RDWR), os.open(file, os.O_RDONLY)
    ctypes.memset(map(cached, mmap.PROT_WRITE, mmap.MAP_SHARED), 1, 1)
    # Whoever maps it past the cache waits for what is not written yet, and holds the process's map meanwhile.
    threading.Thread(target=map, args=(direct, mmap.PROT_READ, mmap.MAP_PRIVATE), daemon=True).start()
    time.sleep(1000)
"""
JOB = HEAD + """
made = remote(CpuLiveServerless(name="hold", workersMax=1), max_retries=0)(hold)
print(made.options(detach=True)(*sys.argv[1:]).id)
"""
STOPPED = HEAD + """
@remote(CpuLiveServerless(name="stopped", workersMax=1), timeout=0.3)
def f(): time.sleep(1000)
print(f().result(timeout=40).status)
"""


ALONE = HEAD + "hold(*sys.argv[1:])"
MANY = HEAD + """
from remoted_client import CpuLiveLoadBalancer
for number in range(10):
    remote(CpuLiveLoadBalancer(name=f"hold{number}", workersMax=1))(hold)(sys.argv[1], sys.argv[2] + str(number))
time.sleep(1000)
"""


#: A host where nothing can be made in a cgroup.
WITHOUT_GROUPS = ("unshare", "--mount", "sh", "-c", 'umount --lazy --all --types cgroup,cgroup2; exec "$@"', "sh")


@pytest.fixture(params=[(), WITHOUT_GROUPS], ids=["groups", "no-groups"])
def wrapper(request: pytest.FixtureRequest) -> tuple[str, ...]:
    found: tuple[str, ...] = request.param
    return found


@pytest.fixture
def served(wrapper: tuple[str, ...]) -> Iterator[tuple[SystemHost, Path, subprocess.Popen[str]]]:
    """A daemon, the file, and its server. When its server ends the kernel lets go whoever waits for it."""
    with system_host() as house:
        point = house.prefix / "point"
        point.mkdir()
        with subprocess.Popen([sys.executable, str(_SERVER), str(point)], stdout=subprocess.PIPE, text=True) as server:
            assert server.stdout is not None
            assert server.stdout.readline() == "ready\n"
            try:
                yield house.start(wrapper=wrapper), point / "file", server
            finally:
                server.kill()
                server.wait()
                subprocess.run(["umount", "-l", str(point)], check=False, capture_output=True)


def test_t64_a_worker_that_nobody_can_look_at_keeps_nobody_else_waiting(served: tuple[SystemHost, Path, subprocess.Popen[str]]) -> None:
    house, silent, _ = served
    alice, bob = house.user("alice", 60001), house.user("bob", 60002)
    pid = alice.home / "pid"
    alice.run(JOB, str(silent), str(pid))
    wait_until(lambda: _is_held(pid), 20, house.log)

    for _ in range(2):
        assert bob.run(STOPPED).out == "TIMED_OUT\n"
    for _ in range(8):  # more often than the loop has threads here
        assert alice.remotectl("workers").out
    assert bob.run(STOPPED).out == "TIMED_OUT\n"


def test_t64_a_process_that_nobody_can_look_at_does_not_keep_the_daemon_from_its_start(served: tuple[SystemHost, Path, subprocess.Popen[str]]) -> None:
    house, silent, server = served
    alice = house.user("alice", 60001)
    pid = alice.home / "pid"
    holding = alice.popen(ALONE, str(silent), str(pid))
    try:
        wait_until(lambda: _is_held(pid), 20, house.log)
        house.stop()
        (house.state / "runtime" / "worker-of-an-older-version.pyz").touch()
        house.start()
        assert house.user("bob", 60002).run(STOPPED).out == "TIMED_OUT\n"
    finally:
        server.kill()
        holding.kill()
        holding.communicate()


def test_t57_t64_processes_that_no_signal_ends_put_off_neither_the_daemons_end_nor_the_start_of_the_next(served: tuple[SystemHost, Path, subprocess.Popen[str]]) -> None:
    house, silent, server = served
    alice = house.user("alice", 60001)
    holding = alice.popen(MANY, str(silent), str(alice.home / "pid"))
    try:
        wait_until(lambda: all(_is_held(alice.home / f"pid{number}") for number in range(10)), 60, house.log)
        assert house.process is not None
        house.process.send_signal(signal.SIGTERM)
        assert house.process.wait(25) == 0
        house.start()  # has thirty seconds
        assert house.user("bob", 60002).run(STOPPED).out == "TIMED_OUT\n"
    finally:
        server.kill()
        holding.kill()
        holding.communicate()
        for number in range(10):  # who was left by a daemon without groups
            with contextlib.suppress(OSError, ValueError):
                os.kill(int((alice.home / f"pid{number}").read_text()), signal.SIGKILL)


#: What alice's interpreter does before it is a fork server: it leaves somebody in its group who cannot be held still.
AT_START = """
import os, subprocess, sys, time
from pathlib import Path
if len(sys.orig_argv) == 4 and sys.orig_argv[1].endswith(".pyz"):
    pid = Path(os.environ["HOME"], f"pid{os.getpid()}")
    subprocess.run(["sh", "-c", '"$@" >/dev/null 2>&1 &', "sh", sys.executable, "-S", os.environ["HOME"] + "/alone.py", os.environ["PYTHON_SILENT"], str(pid)], check=True)
    def is_held():
        return pid.exists() and pid.read_text() and any((task / "stat").read_text().rsplit(")", 1)[1].split()[0] == "D" for task in Path("/proc", pid.read_text(), "task").iterdir())
    while not is_held():
        time.sleep(0.05)
"""
TWELVE = """
from remoted_client import CpuLiveServerless, remote
@remote(CpuLiveServerless(name="twelve", workersMax=12))
def f(x):
    import time; time.sleep(0.5)
jobs = [f(x) for x in range(12)]
print(*{job.result(timeout=60).status for job in jobs})
"""


@pytest.mark.parametrize("wrapper", [()], ids=["groups"])
def test_t58_t64_a_fork_server_that_cannot_be_held_still_is_given_up_at_once(served: tuple[SystemHost, Path, subprocess.Popen[str]]) -> None:
    """Each worker that it bears would take a second of a thread."""
    house, silent, _ = served
    alice = house.user("alice", 60001)
    (alice.home / "sitecustomize.py").write_text(AT_START)
    (alice.home / "alone.py").write_text(HEAD.replace("from remoted_client import CpuLiveServerless, remote\n", "") + "hold(*sys.argv[1:])")
    assert alice.run(TWELVE, PYTHONPATH=f"{alice.home}:{house.library}", PYTHON_SILENT=str(silent)).out == "COMPLETED\n"
    wait_until(lambda: "cannot be held still" in house.log(), 20, house.log)
    assert house.log().count("cannot be held still") == 1
    assert house.log().count("another fork server is started") == 0


ORPHAN = """
import os, subprocess, sys
from remoted_client import CpuLiveServerless, remote
@remote(CpuLiveServerless(name="orphan", workersMax=1), max_retries=0)
def f(pid):
    from pathlib import Path
    Path(pid).write_text(str(subprocess.Popen(["sleep", "1000"], start_new_session=True).pid))
    os.kill(os.getpid(), 9)
print(f(sys.argv[1]).result(timeout=40).status)
"""


def test_t45_what_a_dead_worker_has_left_is_found_without_groups() -> None:
    with system_host() as house:
        alice = house.start(wrapper=WITHOUT_GROUPS).user("alice", 60001)
        pid = alice.home / "pid"
        assert alice.run(ORPHAN, str(pid)).out == "FAILED\n"
        assert not psutil.pid_exists(int(pid.read_text()))


def _is_held(pid: Path) -> bool:
    """Is one of its threads where no signal ends it?"""
    if not pid.exists() or not (number := pid.read_text()):
        return False
    return any((task / "stat").read_text().rsplit(")", 1)[1].split()[0] == "D" for task in Path(f"/proc/{number}/task").iterdir())
