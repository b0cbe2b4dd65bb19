"""F10, F11, T42, T43, T45: what a worker may use together with everything that it starts, and the end of all of it."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from remoted.cgroup import Bounds, find
from tests.harness import wait_until
from tests.root.system_host import UNKNOWN, SystemHost, User, system_host

pytestmark = pytest.mark.root

MEMORY = 400 << 20
TASKS = 60
CONFIG = f"{UNKNOWN}[limits]\nworker_memory_bytes = {MEMORY}\nworker_tasks = {TASKS}\ncancel_term_seconds = 0.5\ncancel_kill_seconds = 2\n"

HEAD = """
import json, os, signal, subprocess, sys, time
from remoted_client import *
from remoted_client import remote, CpuLiveServerless, CpuLiveLoadBalancer
queue = CpuLiveServerless(name=os.environ.get("POOL", "queue"), workersMax=1)
small = CpuLiveServerless(name="small", workersMax=1, template=PodTemplate(memory_gb=0.2))
@remote(queue)
def one(): return 1
def value_of(controller, *names):
    "A limit of this process's own group, of either version."
    for line in open("/proc/self/cgroup"):
        _, controllers, path = line.strip().split(":", 2)
        for root in ("/sys/fs/cgroup/" + controllers, "/sys/fs/cgroup"):
            for name in names:
                try: return open(root + path + "/" + name).read().strip()
                except OSError: pass
"""


@pytest.fixture(scope="module")
def house() -> Iterator[SystemHost]:
    place = find("remoted-probe", Bounds())
    if place is None or place.missing:
        pytest.skip(f"NO CGROUPS CAN BE MADE HERE ({place.missing if place else 'no place'}): the limits of workers were not tested")
    place.close()
    with system_host(CONFIG) as made:
        yield made.start()


def test_f10_f11_limits_come_from_the_config_else_from_the_host(alice: User) -> None:
    program = (
        HEAD
        + """
@remote(CpuLiveServerless(name="quota", workersMax=1, instanceIds=[CpuInstanceType.CPU3G_1_4]))
def quota(): return value_of("cpu", "cpu.cfs_quota_us", "cpu.max"), value_of("memory", "memory.limit_in_bytes", "memory.max")
@remote(queue)
def default(): return value_of("pids", "pids.max"), value_of("memory", "memory.limit_in_bytes", "memory.max")
print(json.dumps([quota().result().unwrap(), default().result().unwrap()]))
"""
    )
    (cpu, memory), (tasks, default_memory) = alice.run(program, PYTHONWARNINGS="default").json

    assert cpu.split()[0] == "100000"
    assert int(memory) == 4 << 30
    assert (int(tasks), int(default_memory)) == (TASKS, MEMORY)
    checks = {check["name"]: check for check in json.loads(alice.remotectl("doctor", "--json", check=False).out)["checks"]}
    assert checks["cgroups"]["ok"], checks["cgroups"]  # while these workers live, by what the kernel has for them


def test_t43_a_body_that_outgrows_its_memory_is_oom_and_says_which_limit(alice: User, bob: User) -> None:
    """Untouched memory costs nothing; what is touched beyond the limit ends the worker, and nobody else's."""
    program = (
        HEAD
        + """
@remote(small, max_retries=0)
def hog():
    held = []
    while len(held) < 2000: held.append(bytearray(os.urandom(1 << 20)))
@remote(small, max_retries=0)
def reserve(): return len(memoryview(__import__("mmap").mmap(-1, 8 << 30)))
out = hog().result()
print(json.dumps([out.status, out.state_reason, out.error, reserve().result().unwrap()]))
"""
    )
    before = bob.run(HEAD + "@remote(queue)\ndef pid(): return os.getpid()\nprint(json.dumps(pid().result().unwrap()))").json
    status, reason, error, reserved = alice.run(program).json
    after = bob.run(HEAD + "@remote(queue)\ndef pid(): return os.getpid()\nprint(json.dumps(pid().result().unwrap()))").json

    assert (status, reason, reserved) == ("FAILED", "OOM_RAM", 8 << 30)
    assert "0.2 GiB" in error or "0.186 GiB" in error
    assert "memory_gb" in error
    assert before == after


def test_t42_a_fork_bomb_meets_its_own_limit_which_is_named(alice: User, bob: User) -> None:
    program = (
        HEAD
        + """
@remote(queue, max_retries=0)
def bomb():
    while True:
        if os.fork() == 0:
            while True: time.sleep(1)
out = bomb().result()
print(json.dumps([out.status, out.error, one().result().unwrap()]))
"""
    )
    status, error, after = alice.run(program, POOL="bomb").json

    assert (status, after) == ("FAILED", 1)
    assert f"{TASKS} processes and threads" in error
    assert "worker_tasks" in error
    assert bob.run(HEAD + "print(json.dumps(one().result().unwrap()))").json == 1


def test_t42_a_worker_full_of_leftovers_is_replaced_when_its_call_is_over(alice: User) -> None:
    program = (
        HEAD
        + """
@remote(queue, max_retries=0)
def leave_all():
    while True:
        try: subprocess.Popen(["sleep", "600"])
        except OSError: return os.getpid()
@remote(queue, max_retries=0)
def fork(): return subprocess.run(["true"]).returncode, os.getpid()
first = leave_all().result().unwrap()
code, second = fork().result().unwrap()
print(json.dumps([code, first != second]))
"""
    )
    assert alice.run(program, POOL="full").json == [0, True]


def test_c04_what_a_body_leaves_in_its_group_is_counted_even_if_it_hides(alice: User, house: SystemHost) -> None:
    folder = _folder(alice, "pids-counted")
    program = (
        HEAD
        + _DAEMONISE
        + """
import http.client, socket
@remote(queue)
def leave(folder): daemonise(folder, 3)
leave(sys.argv[1]).result().unwrap()
connection = http.client.HTTPConnection("remoted")
connection.sock = socket.socket(socket.AF_UNIX)
connection.sock.connect(os.environ["REMOTED_SOCKET"] + "/api.sock")
connection.request("GET", "/v1/workers")
found = json.load(connection.getresponse())["workers"]
print(json.dumps([worker["leftovers"] for worker in found if worker["pool"] == os.environ["POOL"]]))
"""
    )
    assert alice.run(program, str(folder), POOL=folder.name).json == [3]


_DAEMONISE = """
def daemonise(folder, count):
    "Children that leave the session, clear their environment and hang below init."
    for number in range(count):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                os.execve(sys.executable, [sys.executable, "-S", "-c", f"import os, time; open({folder!r} + '/' + str(os.getpid()), 'w').close(); time.sleep(600)"], {})
            os._exit(0)
        os.wait()
    while len(os.listdir(folder)) < count: time.sleep(0.01)
"""


def _alive(folder: Path) -> list[int]:
    return [int(path.name) for path in folder.iterdir() if psutil.pid_exists(int(path.name)) and psutil.Process(int(path.name)).status() != psutil.STATUS_ZOMBIE]


def _folder(user: User, name: str) -> Path:
    folder = user.home / name
    folder.mkdir()
    os.chown(folder, user.uid, user.gid)
    return folder


@pytest.mark.parametrize("listens", [True, False], ids=["the worker survives", "the worker is killed"])
def test_t45_nothing_survives_a_cancelled_attempt(alice: User, listens: bool) -> None:
    folder = _folder(alice, f"pids-{listens}")
    program = (
        HEAD
        + _DAEMONISE
        + """
@remote(queue, max_retries=0)
def escape(folder, listens):
    daemonise(folder, 20)
    while True:
        try: time.sleep(600)
        except KeyboardInterrupt:
            if listens: raise
handle = escape(sys.argv[1], sys.argv[2] == "True")
while len(os.listdir(sys.argv[1])) < 20: time.sleep(0.01)
handle.cancel()
print(json.dumps(handle.result().status))
"""
    )

    assert alice.run(program, str(folder), str(listens), POOL=folder.name).json == "CANCELLED"
    assert len(list(folder.iterdir())) == 20
    assert _alive(folder) == [], "dead before the caller heard of it"


def test_t45_nothing_survives_a_worker_and_its_group_goes_with_it(alice: User) -> None:
    """Between two calls daemons live (a pool kept warm is one); with the worker they end."""
    folder = _folder(alice, "pids-end")
    program = (
        HEAD
        + _DAEMONISE
        + """
@remote(CpuLiveServerless(name="brief", workersMax=1, idleTimeout=1))
def leave(folder):
    daemonise(folder, 5)
    return [line.strip().split(":", 2)[2] for line in open("/proc/self/cgroup")]
print(json.dumps(leave(sys.argv[1]).result().unwrap()))
"""
    )
    paths = [path for path in alice.run(program, str(folder)).json if "/remoted-" in path]

    wait_until(lambda: not _alive(folder), 30)
    assert paths
    wait_until(lambda: not [found for path in paths for found in Path("/sys/fs/cgroup").glob(f"*{path}")], 30)


def test_t45_what_a_dead_daemons_workers_left_is_ended_by_the_next(alice: User, house: SystemHost) -> None:
    folder = _folder(alice, "pids-crash")
    alice.run(HEAD + _DAEMONISE + "@remote(queue)\ndef leave(folder): daemonise(folder, 5)\nprint(json.dumps(leave(sys.argv[1]).result().unwrap()))", str(folder), POOL=folder.name)
    assert len(_alive(folder)) == 5
    assert house.process is not None
    house.process.kill()
    house.process.wait(20)
    house.start()

    assert _alive(folder) == []


def test_f25_the_time_limit_ends_everything_too(alice: User) -> None:
    folder = _folder(alice, "pids-timeout")
    program = HEAD + _DAEMONISE + "@remote(queue, max_retries=0, timeout=2)\ndef slow(folder):\n    daemonise(folder, 3)\n    time.sleep(600)\nprint(json.dumps(slow(sys.argv[1]).result().status))"

    assert alice.run(program, str(folder), POOL=folder.name).json == "TIMED_OUT"
    assert _alive(folder) == []


_CHILD_HOGS = """
import signal
def hog():
    held = []
    while len(held) < 2000: held.append(bytearray(os.urandom(1 << 20)))
def hog_in_child(told=os.devnull):
    child = os.fork()
    if not child:
        hog()
        os._exit(0)
    os.waitpid(child, 0)
    open(told, "w").close()
    time.sleep(60)
    return "lived on without what its child was to do"
"""


def test_t43_want_of_memory_in_a_child_ends_the_whole_attempt(alice: User, bob: User) -> None:
    """Version 2 does so by memory.oom.group; version 1 kills one process, and the daemon the others."""
    program = (
        HEAD
        + _CHILD_HOGS
        + """
@remote(small, max_retries=0)
def queued(): return hog_in_child()
@remote(CpuLiveLoadBalancer(name="small", workersMax=1, template=PodTemplate(memory_gb=0.2)))
def direct(): return hog_in_child()
@remote(small, max_retries=0)
def fine(): return 1
out = queued().result(timeout=40)
try: direct().result(timeout=40)
except WorkerLost as error: lost = str(error)
print(json.dumps([out.status, out.state_reason, out.error, lost, fine().result().unwrap()]))
"""
    )
    before = bob.run(HEAD + "@remote(queue)\ndef pid(): return os.getpid()\nprint(json.dumps(pid().result().unwrap()))").json
    status, reason, error, lost, after = alice.run(program).json

    assert (status, reason, after) == ("FAILED", "OOM_RAM", 1)
    assert "memory_gb" in error
    assert "memory_gb" in lost
    assert bob.run(HEAD + "@remote(queue)\ndef pid(): return os.getpid()\nprint(json.dumps(pid().result().unwrap()))").json == before


@pytest.mark.parametrize("is_there", [True, False], ids=["watched", "unwatched"])
def test_t43_want_of_memory_without_a_daemon_is_found_by_the_next(alice: User, house: SystemHost, is_there: bool) -> None:
    """The next one watches a worker that it only waits for as well as its own."""
    folder = _folder(alice, f"oom-later-{is_there}")
    program = HEAD + _CHILD_HOGS + """
@remote(small, max_retries=0)
def later(folder):
    open(folder + "/begun", "w").close()
    while not os.path.exists(folder + "/go"): time.sleep(0.02)
    return hog_in_child(folder + "/alone")
print(json.dumps(later.options(detach=True)(sys.argv[1]).id))
"""
    job = alice.run(program, str(folder)).json
    wait_until((folder / "begun").exists, 20)
    assert house.process is not None
    house.process.terminate()
    house.process.wait(20)
    if is_there:
        house.start()
    (folder / "go").touch()
    if not is_there:
        wait_until((folder / "alone").exists, 20)
        house.start()

    status, reason = alice.run(HEAD + f"out = Job.from_id({job!r}).result(timeout=40); print(json.dumps([out.status, out.state_reason]))").json
    assert (status, reason) == ("FAILED", "OOM_RAM")
