"""Becoming the user (MECHANISMS 1): what a worker has of the daemon's, which is nothing, and what root touches, which is its own."""

from __future__ import annotations

import ctypes
import json
import os
import resource
import shutil
import signal
import struct
import subprocess
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from remoted.access import Identity
from remoted.spawn.becoming import Becoming, command
from tests.fakes.wheels import make_slow_source
from tests.harness import wait_until
from tests.root.system_host import UNKNOWN, SystemHost, User, system_host

pytestmark = pytest.mark.root

HEAD = """
import json, os, signal, subprocess, sys
from remoted_client import *
from remoted_client import remote, CpuLiveServerless, CpuLiveLoadBalancer
queue = CpuLiveServerless(name="queue", workersMax=1)
"""


# -- the change itself -------------------------------------------------------------------------------------


def _enter(*wrapper: str, uid: int = 60001, groups: tuple[int, ...] = (60005,)) -> subprocess.CompletedProcess[str]:
    """The entry program as the daemon starts it, with a program that says that it ran."""
    argv, orders = command(Becoming(Identity(uid, uid, groups)), ("/usr/bin/id", "-G"), {}, ())
    try:
        return subprocess.run([*wrapper, *argv], env={}, cwd="/", pass_fds=(orders,), capture_output=True, text=True, timeout=60, check=False)
    finally:
        os.close(orders)


def test_t22_the_entry_program_becomes_and_executes() -> None:
    done = _enter()

    assert (done.returncode, done.stdout.split()) == (0, ["60001", "60005"]), done.stderr


@pytest.mark.parametrize("call", ["setgroups", "setresgid", "setresuid", "prctl", "setpriority"])
def test_t23_a_call_that_fails_ends_the_launch_before_any_code_of_the_users(call: str) -> None:
    done = _enter("/usr/bin/strace", "-f", "-o", "/dev/null", "-e", f"inject={call}:error=EAGAIN")

    assert done.stdout == ""
    assert done.returncode == 70
    assert "cannot become the user" in done.stderr


@pytest.mark.parametrize("call", ["setgroups", "setresgid", "setresuid"])
def test_t24_a_call_that_only_says_that_it_worked_is_found_out(call: str) -> None:
    """As if the old ids had stayed within reach: the proof fails, and nothing of the user's runs."""
    done = _enter("/usr/bin/strace", "-f", "-o", "/dev/null", "-e", f"inject={call}:retval=0")

    assert done.stdout == ""
    assert done.returncode == 70


def test_t24_a_worker_that_is_not_who_it_should_be_ends_before_its_first_call(alice: User) -> None:
    """The second look, from inside: the runtime of a worker is told another uid than it has."""
    program = """
import sys; sys.path[:0] = sys.argv[1:]
import os
from remoted.worker import preflight
preflight.require({"uid": os.getuid() + 1, "gid": os.getgid(), "groups": os.getgroups(), "no_new_privileges": False})
print("went on")
"""
    site = next(alice.host.prefix.glob("venv/lib/python3.*/site-packages"))
    done = alice.run(program, str(site), check=False)

    assert (done.code, done.out) == (70, "")
    assert "uids are" in done.err


def test_t22_no_capability_is_left_and_none_can_be_gained(house: SystemHost, alice: User) -> None:
    """T28: a setuid program makes nobody root in a worker."""
    setuid = house.prefix / "setuid-id"
    shutil.copy("/usr/bin/id", setuid)
    setuid.chmod(0o4755)
    program = (
        HEAD
        + """
@remote(queue)
def look(program):
    with open("/proc/self/status") as file: status = {line.partition(":")[0]: line.partition(":")[2].strip() for line in file}
    regained = []
    for act in (lambda: os.setuid(0), lambda: os.setgid(0), lambda: os.setgroups([0]), lambda: os.setresuid(-1, 0, -1)):
        try: act(); regained.append(1)
        except PermissionError: pass
    return [status[name] for name in ("CapPrm", "CapEff", "CapAmb", "CapInh", "NoNewPrivs")], regained, subprocess.check_output([program, "-u"], text=True)
print(json.dumps([look(sys.argv[1]).result().unwrap(), subprocess.check_output([sys.argv[1], "-u"], text=True)]))
"""
    )
    (capabilities, regained, inside), outside = alice.run(program, str(setuid)).json

    assert capabilities == ["0" * 16] * 4 + ["1"]
    assert regained == []
    assert (inside, outside) == ("60001\n", "0\n"), "elsewhere the same program does become root"


def test_t28_setuid_programs_work_where_the_configuration_says_so() -> None:
    with system_host(UNKNOWN + "[workers]\nno_new_privileges = false\n") as host:
        setuid = host.prefix / "setuid-id"
        shutil.copy("/usr/bin/id", setuid)
        setuid.chmod(0o4755)
        program = HEAD + "@remote(queue)\ndef f(program): return subprocess.check_output([program, '-u'], text=True)\nprint(json.dumps(f(sys.argv[1]).result().unwrap()))"
        assert host.start().user("alice", 60001).run(program, str(setuid)).json == "0\n"


# -- what is inherited -------------------------------------------------------------------------------------


def test_t25_t26_t27_nothing_of_the_daemons_is_a_workers() -> None:
    """A daemon from a careless parent: niced, with a mask, blocked and ignored signals, secrets in its environment."""
    careless = "import os, signal, sys; os.umask(0o077); os.nice(5); signal.signal(signal.SIGTERM, signal.SIG_IGN); signal.signal(signal.SIGUSR2, signal.SIG_IGN); signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1}); os.execv(sys.argv[1], sys.argv[1:])"
    program = (
        HEAD
        + """
@remote(queue)
def look():
    with open("/proc/self/status") as file: status = {line.partition(":")[0]: line.partition(":")[2].strip() for line in file}
    links = []
    for name in os.listdir("/proc/self/fd"):
        try: links.append(os.readlink(f"/proc/self/fd/{name}"))
        except FileNotFoundError: pass
    with open("/proc/self/environ") as file: born = file.read()
    import resource
    return {
        "nice": os.getpriority(os.PRIO_PROCESS, 0), "blocked": int(status["SigBlk"], 16), "ignored": int(status["SigIgn"], 16),
        "session": os.getsid(0) == os.getpid(), "core": resource.getrlimit(resource.RLIMIT_CORE), "oom": int(open("/proc/self/oom_score_adj").read()),
        "links": links, "secret": "DAEMONS_OWN" in born or "NOTIFY_SOCKET" in born or "DAEMONS_OWN" in os.environ,
    }
print(json.dumps(look().result().unwrap()))
"""
    )
    with system_host() as host:
        wrapper = host.prefix / "careless"
        wrapper.write_text(f"#!/usr/bin/python3 -IS\n{careless}\n", encoding="utf-8")
        wrapper.chmod(0o755)
        host.start(wrapper=(str(wrapper),), DAEMONS_OWN="secret", NOTIFY_SOCKET="/nowhere")
        found = host.user("alice", 60001).run(program, PYTHONWARNINGS="default").json
        assert host.process is not None
        theirs = {os.readlink(f"/proc/{host.process.pid}/fd/{name}") for name in os.listdir(f"/proc/{host.process.pid}/fd")}

    sockets = {link for link in found["links"] if link.startswith("socket:")}
    assert not sockets & theirs
    assert len(sockets) <= 3  # the channel, and its own event loop's pair
    assert not [link for link in found["links"] if str(host.state) in link and not link.endswith((".pyz", ".outcomes", ".output", ".begun"))]
    assert (found["nice"], found["blocked"], found["core"], found["oom"], found["session"], found["secret"]) == (0, 0, [0, 0], 0, True, False)
    # Python itself ignores the first two; 32 and 33 are the C library's own, which make ignores and no program may set (signal(7)).
    assert found["ignored"] & ~sum(1 << number - 1 for number in (signal.SIGPIPE, signal.SIGXFSZ, 32, 33)) == 0


def test_c03_a_worker_has_its_callers_limits(alice: User) -> None:
    """What an administrator limits a user's processes by, holds for those that the daemon starts."""
    program = (
        HEAD
        + """
import resource
resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 21))
resource.setrlimit(resource.RLIMIT_NOFILE, (300, 400))
@remote(queue)
def limits(): return resource.getrlimit(resource.RLIMIT_FSIZE), resource.getrlimit(resource.RLIMIT_NOFILE)
print(json.dumps(limits().result().unwrap()))
"""
    )

    assert alice.run(program).json == [[1 << 20, 1 << 21], [300, 400]]
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[1] == resource.RLIM_INFINITY


def test_t27_what_the_loader_and_the_interpreter_obey_is_obeyed_by_the_user_only(alice: User) -> None:
    """The caller's variables say what to preload and what to import first; root does neither."""
    log, trap = alice.home / "log", alice.home / "trap"
    trap.mkdir()
    (trap / "sitecustomize.py").write_text(f"import os; open({str(log)!r}, 'a').write(f'{{os.geteuid()}}\\n')\n", encoding="utf-8")
    for path in (trap, trap / "sitecustomize.py"):
        os.chown(path, alice.uid, alice.gid)
    program = HEAD + "@remote(queue)\ndef f(): return 1\nprint(json.dumps(f().result().unwrap()))"

    assert alice.run(program, PYTHONPATH=f"{trap}:{alice.host.library}", LD_PRELOAD=str(trap / "absent.so")).json == 1
    assert set(log.read_text(encoding="utf-8").split()) == {"60001"}


def test_t40_t41_no_secret_shows_and_nobody_may_look(house: SystemHost, alice: User, bob: User) -> None:
    go = alice.home / "go"
    program = (
        HEAD
        + """
@remote(queue, env={"TOKEN": "swordfish-7"})
def wait(secret, path):
    import time
    open(path + ".pid", "w").write(str(os.getpid()))
    while not os.path.exists(path): time.sleep(0.01)
print(json.dumps(wait("swordfish-8", sys.argv[1]).result().status))
"""
    )
    script = alice.popen(program, str(go), PYTHONWARNINGS="default")
    try:
        pid_file = Path(f"{go}.pid")
        wait_until(lambda: pid_file.exists() and pid_file.read_text(encoding="ascii"), 30)
        worker = int(pid_file.read_text(encoding="ascii"))
        shown = "".join(" ".join(process.info["cmdline"] or ()) for process in psutil.process_iter(["cmdline"]) if process.pid != os.getpid())
        assert house.process is not None
        found = bob.run(_TRESPASS, str(worker), str(house.process.pid)).json
    finally:
        go.touch()
        out, _ = script.communicate(timeout=60)
    assert json.loads(out.splitlines()[-1]) == "COMPLETED"
    assert "swordfish" not in shown
    assert found == [[True] * 4, [True] * 4]


_TRESPASS = """
import ctypes, errno, json, os, signal, sys
libc = ctypes.CDLL(None, use_errno=True)
def denied(act):
    try: act()
    except PermissionError: return True
    return False
def attach(pid):
    if libc.ptrace(16, pid, None, None) != 0: raise OSError(ctypes.get_errno(), "ptrace")
def read(path):
    with open(path) as file: file.read()
print(json.dumps([[denied(lambda: attach(pid)), denied(lambda: read(f"/proc/{pid}/environ")), denied(lambda: os.listdir(f"/proc/{pid}/fd")), denied(lambda: os.kill(pid, signal.SIGTERM))] for pid in map(int, sys.argv[1:])]))
"""


def test_t41_a_daemon_that_crashes_leaves_no_core(house: SystemHost) -> None:
    assert house.process is not None

    assert resource.prlimit(house.process.pid, resource.RLIMIT_CORE) == (0, 0)


# -- the user's paths --------------------------------------------------------------------------------------


@pytest.fixture
def own_python(alice: User) -> str:
    """A venv in a home that nobody else may enter, not even root without its capabilities."""
    made = alice.popen_command(["/usr/bin/python3", "-m", "venv", "--without-pip", "--copies", str(alice.home / "venv")])
    assert made.wait(60) == 0
    made.communicate()
    return str(alice.home / "venv/bin/python")


def test_t30_an_interpreter_in_a_closed_home_is_executed_by_its_user(alice: User, own_python: str) -> None:
    program = HEAD + "@remote(queue)\ndef f(): return sys.executable, os.getuid()\nprint(json.dumps(f().result().unwrap()))"
    with watched_opens(own_python) as opened:
        assert alice.run(program, python=own_python).json == [own_python, 60001]

    assert opened
    assert set(opened) == {60001}, "root has not even opened it"


def test_t30_an_interpreter_whose_execve_hangs_keeps_nobody_else(alice: User, bob: User, own_python: str) -> None:
    """As behind a file system that hangs: the kernel holds the execve until the other user's call has been served."""
    program = HEAD + "@remote(queue)\ndef f(): return os.getuid()\nprint(json.dumps(f().result().unwrap()))"
    cold = alice.host.user("alice", alice.uid, alice.gid, (60007,))  # another set of groups has no warm worker
    served = threading.Event()
    held = threading.Event()

    def hold(uid: int, pid: int) -> None:
        if "entry.py" in " ".join(psutil.Process(pid).cmdline()):
            held.set()
            served.wait(60)

    with watched_opens(own_python, hold):
        script = cold.popen(program, python=own_python)
        assert held.wait(60)
        assert bob.run(program).json == 60002
        assert script.poll() is None
        served.set()
        out, err = script.communicate(timeout=60)
    assert json.loads(out.splitlines()[-1]) == 60001, err


def test_t36_environments_are_built_by_the_user_in_the_users_folder() -> None:
    """A source distribution's build is somebody's code: here it says as whom it runs."""
    with system_host() as host:
        wheels = host.prefix / "wheels"
        flag = host.prefix / "flag"
        make_slow_source(wheels, "whoami", "1.0", flag)
        flag.touch()
        flag.chmod(0o666)
        (host.prefix / "etc/remoted/config.toml").write_text(f"{UNKNOWN}[environments]\noffline = true\nwheel_folders = [{str(wheels)!r}]\n", encoding="utf-8")
        alice = host.start().user("alice", 60001)
        script = alice.popen(
            HEAD + "@remote(queue, dependencies=['whoami==1.0'])\ndef f():\n    import whoami\n    return whoami.version, whoami.__file__\nprint(json.dumps(f().result().unwrap()))"
        )
        wait_until(lambda: script.poll() is not None or flag.read_text(encoding="ascii"), 60, lambda: host.log())
        assert script.poll() is None, script.communicate()
        builder = psutil.Process(int(flag.read_text(encoding="ascii")))
        family = {process.uids().real for process in (builder, *builder.parents()) if process.pid in {p.pid for p in psutil.Process(host.process.pid if host.process else 0).children(recursive=True)}}
        flag.unlink()
        out, err = script.communicate(timeout=60)
        assert script.returncode == 0, f"{err}\n{host.log()}"
        version, place = json.loads(out.splitlines()[-1])
        listed = alice.remotectl("env", "list", "--json").out
        others = host.user("bob", 60002).remotectl("env", "list", "--json").out
        owner = os.stat(place).st_uid

    assert family == {60001}, "from the steward to the backend everybody is the user"
    assert (version, owner) == ("1.0", 60001)
    assert Path(place).is_relative_to(alice.home)
    assert isinstance(json.loads(listed), object)
    assert "whoami" not in others


def test_t36_a_home_where_nothing_can_be_made_says_so(house: SystemHost) -> None:
    homeless = house.user("homeless", 60009, HOME="/proc/none")
    told = homeless.run(HEAD + "@remote(queue, dependencies=['x'], max_retries=0)\ndef f(): return 1\nprint(json.dumps(f().result().error))").json

    assert "cannot" in told
    assert "/proc/none" in told


# -- watching who opens what -------------------------------------------------------------------------------

_FAN_CLASS_CONTENT, _FAN_CLOEXEC, _FAN_MARK_ADD, _FAN_OPEN_PERM, _FAN_OPEN_EXEC_PERM, _FAN_ALLOW = 4, 1, 1, 0x10000, 0x40000, 1
_AT_FDCWD = -100
_EVENT = struct.Struct("IBBHQii")


class watched_opens:
    """Who opens or executes a file, as the kernel asks before it allows it (fanotify(7)); ``hold`` may take its time."""

    def __init__(self, path: str, hold: Callable[[int, int], None] | None = None) -> None:
        self._path = os.path.realpath(path)
        self._hold = hold
        self.uids: list[int] = []

    def __enter__(self) -> list[int]:
        libc = ctypes.CDLL(None, use_errno=True)
        self._fd = libc.fanotify_init(_FAN_CLASS_CONTENT | _FAN_CLOEXEC, os.O_RDONLY | os.O_CLOEXEC)
        assert self._fd >= 0, os.strerror(ctypes.get_errno())
        mask = ctypes.c_uint64(_FAN_OPEN_PERM | _FAN_OPEN_EXEC_PERM)
        assert libc.fanotify_mark(self._fd, _FAN_MARK_ADD, mask, _AT_FDCWD, self._path.encode()) == 0, os.strerror(ctypes.get_errno())
        self._stop_read, self._stop = os.pipe()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()
        return self.uids

    def __exit__(self, *exception: Any) -> None:
        os.close(self._stop)
        self._thread.join()
        os.close(self._stop_read)
        os.close(self._fd)

    def _serve(self) -> None:
        import select

        while self._fd in select.select([self._fd, self._stop_read], [], [])[0]:
            data = os.read(self._fd, 65536)
            for fd, pid in self._events(data):
                uid = os.stat(f"/proc/{pid}").st_uid if Path(f"/proc/{pid}").exists() else -1
                self.uids.append(_effective_uid(pid, uid))
                threading.Thread(target=self._answer, args=(fd, uid, pid)).start()

    def _events(self, data: bytes) -> Iterator[tuple[int, int]]:
        offset = 0
        while offset < len(data):
            length, _, _, _, _, fd, pid = _EVENT.unpack_from(data, offset)
            offset += length
            yield fd, pid

    def _answer(self, fd: int, uid: int, pid: int) -> None:
        if self._hold is not None:
            self._hold(uid, pid)
        os.write(self._fd, struct.pack("iI", fd, _FAN_ALLOW))
        os.close(fd)


def _effective_uid(pid: int, default: int) -> int:
    """Of a process that is not dumpable /proc/PID is root's, whoever it is: its status says the truth."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return default
    return next(int(line.split()[2]) for line in lines if line.startswith("Uid:"))
