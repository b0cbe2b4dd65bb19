"""T23, T49: the daemon dies at, or the kernel refuses, any system call of a submission; any call of the change of ids fails.

Where the calls are is found by recording one submission; then each is a point: the daemon is traced anew, and at that call
it is killed, or the call fails (strace(1), inject). The client finds, or starts, the next daemon. REMOTED_TEST_POINTS says
how many points are tried, spread over all; 0 is all of them.
"""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.test_daemon_deaths import HEAD, lines_of
from tests.harness import Host, host, wait_until
from tests.root.system_host import SystemHost, system_host
from tests.root.vm_load import report

pytestmark = [pytest.mark.root, pytest.mark.timeout(3000)]

POINTS = int(os.environ.get("REMOTED_TEST_POINTS", "10"))
#: Calls that wait, or that only the interpreter's own memory and locks need: to die there is to die at the next one.
_DULL = frozenset({"epoll_wait", "futex", "mmap", "munmap", "mprotect", "madvise", "brk", "clock_nanosleep", "rt_sigprocmask", "restart_syscall", "exit", "getpid", "gettid", "set_robust_list", "rseq"})
#: What the kernel may refuse on a disk or socket that has gone bad.
_FALLIBLE = frozenset({"openat", "read", "write", "pread64", "pwrite64", "fsync", "fdatasync", "sendto", "sendmsg", "recvmsg", "sendfile", "copy_file_range", "ftruncate", "fallocate", "newfstatat", "fstat", "lseek", "linkat", "rename", "renameat2", "unlink", "statfs", "memfd_create"})
#: A worker whose channel fails is no worker any more.
_CHANNEL = frozenset({"sendto", "sendmsg", "recvmsg"})
_CALL = re.compile(r"^([a-z_0-9]+)\(")
SUBMIT = (
    HEAD
    + """
@remote(queue, max_retries=0)
def once(path, data):
    token(path)
    return len(data)
try:
    job = once.options(detach=sys.argv[3] == "detached")(sys.argv[1], b"x" * int(sys.argv[2]))
    print("acknowledged", job.id, flush=True)
    print("outcome", job.result(timeout=40).status.value, flush=True)
except (SubmissionRefused, DaemonUnreachable) as error:
    print("refused", type(error).__name__, error, flush=True)
"""
)
#: A job whose beginning cannot be stored waits for so long.
_SOON = "[limits]\nretry_cap_seconds = 1\n"
#: Its arguments are a file of content, beside the row.
SIZE = "200000"


def _daemon_pid(place: Host) -> int:
    """Of whichever runs now, and is warm: the client starts one if there is none."""
    _submit(place)
    return int((place.state / "remoted" / "lock").read_text().split()[0])


def _trace(pid: int, *options: str) -> subprocess.Popen[bytes]:
    """Its threads, without what it starts; ready when this returns."""
    tasks = list(Path(f"/proc/{pid}/task").iterdir())
    threads = [word for task in tasks for word in ("-p", task.name)]
    made = subprocess.Popen(["strace", "-qq", *options, *threads], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    wait_until(lambda: all("TracerPid:\t0\n" not in (task / "status").read_text(encoding="ascii", errors="replace") for task in tasks if task.exists()), 20)
    return made


def _end(tracer: subprocess.Popen[bytes]) -> None:
    """Of several threads that were killed it may wait for one that is gone."""
    tracer.terminate()
    try:
        tracer.wait(5)
    except subprocess.TimeoutExpired:
        tracer.kill()
        tracer.wait(5)


def _submit(place: Host, how: str = "detached") -> list[list[str]]:
    done = place.run(SUBMIT, str(place.project / "tokens"), SIZE, how, timeout=90)
    return [line.split(maxsplit=1) for line in done.out.splitlines() if line.startswith(("acknowledged", "outcome", "refused"))]


@pytest.fixture(scope="module")
def place() -> Iterator[Host]:
    """A daemon that is warm: its threads are there, and a worker."""
    with host(_SOON) as made:
        xdg = made.folder / "xdg/remoted"  # for the daemons that clients start
        xdg.mkdir(parents=True)
        (xdg / "config.toml").write_text(_SOON, encoding="utf-8")
        made.start()
        for _ in range(3):
            _submit(made)
        yield made
        process = psutil.Process(_daemon_pid(made))
        process.send_signal(signal.SIGQUIT)
        process.wait(20)


@pytest.fixture(scope="module")
def points(place: Host, tmp_path_factory: pytest.TempPathFactory) -> list[tuple[str, int]]:
    """(call, which of them in a thread), of one submission from its first byte to its outcome."""
    folder = tmp_path_factory.mktemp("record")
    tracer = _trace(_daemon_pid(place), "-ff", "-o", str(folder / "trace"))
    _submit(place)
    _end(tracer)
    most: Counter[str] = Counter()
    for path in folder.iterdir():
        own = Counter(match[1] for line in path.read_text(encoding="utf-8", errors="replace").splitlines() if (match := _CALL.match(line)))
        most |= own
    return [(call, number) for call, count in sorted(most.items()) if call not in _DULL for number in range(1, count + 1)]


def _sample(points: list[tuple[str, int]]) -> list[tuple[str, int]]:
    return points if not POINTS else points[:: max(1, len(points) // POINTS)]


def _try(place: Host, point: tuple[str, int], what: str) -> str:
    """One submission with one fault; what came of it, in a word."""
    pid = _daemon_pid(place)
    before = len(lines_of(place.project / "tokens"))
    tracer = _trace(pid, "-o", "/dev/null", "-e", f"trace={point[0]}", "-e", f"inject={point[0]}:{what}:when={point[1]}")
    told = _submit(place, "detached" if point[1] % 2 else "awaited")  # of this one the first attempt leaves before the disk has it
    is_dead = not psutil.pid_exists(pid)
    _end(tracer)
    if not is_dead and what.startswith("error"):  # what it has told must be on the disk, not only in its head
        psutil.Process(pid).kill()
    jobs = [word[1] for word in told if word[0] == "acknowledged"]
    outcomes = {job: place.run(HEAD + "out = Job.from_id(sys.argv[1]).result(timeout=60)\nprint(json.dumps([out.status, out.state_reason]))", job, timeout=90).json for job in jobs}
    runs = lines_of(place.project / "tokens")[before:]
    assert len(runs) <= 1, f"{point}: the body ran {len(runs)} times"
    assert len(jobs) <= 1, (point, told)
    assert told, f"{point}: the client heard nothing"
    assert jobs or not runs, f"{point}: what was refused ran"
    for status, reason in outcomes.values():
        assert (status, reason) in (("COMPLETED", ""), ("FAILED", "LOST")) or (reason == "WORKER_DIED" and point[0] in _CHANNEL), (point, status, reason)
        assert status != "COMPLETED" or len(runs) == 1, point
        assert ["outcome", "COMPLETED"] not in told or status == "COMPLETED", f"{point}: what was told is no longer so"
    return f"{'died' if is_dead else 'lived'}, {next(iter(outcomes.values()))[0] if outcomes else 'refused'}"


@pytest.mark.parametrize("what", ["signal=KILL", "error=EIO"])
def test_t49_at_no_system_call_of_a_submission_is_anything_lost_or_repeated(place: Host, points: list[tuple[str, int]], what: str) -> None:
    chosen = _sample([point for point in points if what.startswith("signal") or point[0] in _FALLIBLE])
    ended = Counter(_try(place, point, what) for point in chosen)
    report(f"{len(chosen)} of {len(points)} points: {dict(ended)}")

    assert what.startswith("error") or any(word.startswith("died") for word in ended), ended
    _submit(place)
    stored = json.loads(place.run(HEAD + "import subprocess\nprint(subprocess.check_output([sys.executable, '-c', 'from remoted.cli import main; main()', 'ps', '-a', '--limit', '100000', '--json'], text=True).replace(chr(10), ' '))").out.splitlines()[-1])["jobs"]
    assert all(job["status"] in ("COMPLETED", "FAILED") for job in stored)


# -- the change of ids -------------------------------------------------------------------------------------

BODY = """
import json, os, sys
from remoted_client import *
from remoted_client import remote
@remote(CpuLiveServerless(name=sys.argv[1], workersMax=1), max_retries=0)
def body(path):
    with open(path, "a") as file: file.write(str(os.getresuid()))
out = body(sys.argv[2]).result(timeout=60)
print(json.dumps([out.status, out.error]))
"""
_STEPS = {
    **{call: f"{call}:error=EPERM" for call in ("setgroups", "setresgid", "setresuid", "prctl")},
    # Popen's own come first, in the daemon's name.
    "chdir": "chdir:error=EACCES:when=2+",
    "execve": "execve:error=EACCES:when=2+",
    "killed": "setresuid:signal=KILL",
}


@pytest.fixture
def bare_house() -> Iterator[SystemHost]:
    with system_host() as made:
        yield made.start()


@pytest.mark.parametrize("step", _STEPS)
def test_t23_a_step_of_the_change_that_fails_fails_the_job_and_runs_nothing(bare_house: SystemHost, step: str) -> None:
    """Of the whole daemon: whatever it starts for a user meets the fault, and the next user's call, without it, is served."""
    assert bare_house.process is not None
    alice, bob = bare_house.user("alice", 60001), bare_house.user("bob", 60002)
    mark = alice.home / "ran"
    tracer = subprocess.Popen(["strace", "-f", "-qq", "-o", "/dev/null", "-e", f"trace={_STEPS[step].split(':')[0]}", "-e", f"inject={_STEPS[step]}", "-p", str(bare_house.process.pid)], stderr=subprocess.DEVNULL)
    status = Path(f"/proc/{bare_house.process.pid}/status")
    wait_until(lambda: "TracerPid:\t0\n" not in status.read_text(encoding="ascii", errors="replace"), 20)
    found = alice.run(BODY, "fault", str(mark)).json
    _end(tracer)

    assert found[0] == "FAILED"
    assert {"killed": "cannot start a worker", "chdir": "cannot execute", "execve": "cannot execute"}.get(step, "cannot become the user") in found[1], found
    assert not mark.exists()
    assert bob.run(BODY, "sound", str(bob.home / "ran")).json[0] == "COMPLETED"
    assert (bob.home / "ran").read_text(encoding="ascii") == str((60002,) * 3)
