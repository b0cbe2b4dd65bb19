"""F30 preload, C05: workers that are forked. What they share, what is their own, and when they are started plainly instead."""

from __future__ import annotations

import json
import os
import signal
from typing import Any

import psutil
import pytest

from tests.faults.test_daemon_deaths import end_daemon
from tests.harness import Host, host, wait_until

HEAD = """
import glob, json, os, random, resource, signal, subprocess, sys, threading, time
from remoted_client import *
from remoted_client import remote, CpuLiveServerless, CpuLiveLoadBalancer, Job
def pool(name, **fields): return CpuLiveServerless(name=name, workersMax=1, **fields)
"""


def ctl(daemon: Host, command: str) -> Any:
    """What ``remotectl COMMAND --json`` prints."""
    code = f"import sys; from remoted.cli import main; sys.argv = ['remotectl', {command!r}, '--json']; main()"
    return json.loads(daemon.run(daemon.write("ctl.py", code)).out)


def worker_of(daemon: Host, name: str) -> Any:
    found = [worker for worker in ctl(daemon, "workers")["workers"] if worker["pool"] == name]
    assert found, f"no worker of {name} is left:\n{daemon.log()[-4000:]}"
    return found[0]


def installed(daemon: Host, name: str, text: str) -> str:
    """A module among installed packages; gives the PYTHONPATH with which scripts and workers find it."""
    folder = daemon.folder / "lib" / "site-packages"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(text, encoding="utf-8")
    return os.pathsep.join([daemon.environ["PYTHONPATH"], str(folder)])


def test_f30_preload_is_imported_once_and_shared(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
def loaded(): return "numpy" in sys.modules, os.getppid()
outs = [remote(pool(name, preload="numpy"))(loaded)().result().unwrap() for name in ("shared-1", "shared-2")]
print(json.dumps(outs))
"""
    )
    assert shared_daemon.process is not None
    assert result.json == [[True, shared_daemon.process.pid]] * 2

    first, second = worker_of(shared_daemon, "shared-1"), worker_of(shared_daemon, "shared-2")
    assert first["start"] == second["start"] == "forked"
    assert first["fork_server"] == second["fork_server"]
    server = next(server for server in ctl(shared_daemon, "status")["fork_servers"] if server["id"] == first["fork_server"])
    assert (server["state"], server["preload"], server["births"]) == ("ready", ["numpy"], 2)
    assert server["memory"]["shared"] > 1 << 20
    assert first["memory"]["private"] < first["memory"]["resident"]


def test_f30_preload_two_workers_draw_different_numbers(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
def draw():
    import numpy, uuid, tempfile, multiprocessing
    return [random.random(), numpy.random.rand(), str(uuid.uuid4()), tempfile.mktemp(), multiprocessing.current_process().authkey.hex()]
fields = {"preload": ["numpy", "numpy.random", "uuid", "tempfile", "multiprocessing"]}
print(json.dumps([remote(pool(f"draw-{n}", **fields))(draw)().result().unwrap() for n in range(3)]))
"""
    )
    for drawn in zip(*result.json, strict=True):
        assert len(set(drawn)) == 3


FACTS = """
def facts():
    import asyncio
    fds = sorted(os.readlink(path).partition(":")[0].replace(os.environ["REMOTED_WORKER_ID"], "worker") for path in glob.glob("/proc/self/fd/*") if os.path.exists(path))
    return {
        "environ": {k: v for k, v in os.environ.items() if k not in ("REMOTED_WORKER_ID", "REMOTED_SOCKET")},
        "seen": [os.environ["REMOTED_WORKER_ID"] in open("/proc/self/environ").read()],
        "argv": sys.argv, "cwd": os.getcwd(), "path": [p for p in sys.path if not p.endswith(".pyz")], "fds": fds,
        "ids": [os.getsid(0) == os.getpid(), os.getpgid(0) == os.getpid(), threading.main_thread().ident == threading.get_ident(),
                threading.get_native_id() == os.getpid(), threading.active_count()],
        "signals": [str(signal.getsignal(n)) for n in (signal.SIGTERM, signal.SIGCHLD, signal.SIGPIPE, signal.SIGHUP)],
        "mask": sorted(signal.pthread_sigmask(signal.SIG_BLOCK, ())),
        "limits": [resource.getrlimit(n) for n in (resource.RLIMIT_NOFILE, resource.RLIMIT_DATA, resource.RLIMIT_CORE)],
        "main": sorted(vars(sys.modules["__main__"])), "flags": str(sys.flags), "prefix": sys.prefix,
        "child": subprocess.run([sys.executable, "-c", "import os; print(os.environ['REMOTED_WORKER_ID'])"], stdout=subprocess.PIPE, text=True).stdout.strip()
                 == os.environ["REMOTED_WORKER_ID"],
        "tasks": len(os.listdir("/proc/self/task")),
    }
"""


def test_c05_a_forked_worker_is_as_a_plain_one() -> None:
    """Variables, directory, descriptors, signals, limits and identity: to a body there is no difference."""
    found = {}
    for servers in (0, 4):
        with host(f"[limits]\nfork_servers_total = {servers}\n") as made:
            made.start()
            script = HEAD + FACTS + "print(json.dumps(remote(pool('facts'), env={'MODE': 'x'})(facts)().result().unwrap()))"
            text = json.dumps(made.run(script).json, sort_keys=True)
            found[servers] = text.replace(str(made.folder), "/folder").replace(made.folder.parent.name, "folder")
            worker = worker_of(made, "facts")
            assert worker["start"] == ("forked" if servers else "plain")
            assert worker["start_reason"] == ("" if servers else "fork servers are turned off (fork_servers_total is 0)")
    assert json.loads(found[4]) == json.loads(found[0])


UNFIT = {
    "missing": ("", "cannot import unfit_missing_: ModuleNotFoundError"),
    "raises": ("raise OSError('no licence')", "cannot import unfit_raises: OSError: no licence"),
    "exits": ("import sys; sys.exit(3)", "cannot import unfit_exits: SystemExit: 3"),
    "dies": ("import os; os.kill(os.getpid(), 11)", "the fork server was killed by signal 11 (SIGSEGV) while it imported"),
    "thread": ("import threading; threading.Thread(target=threading.Event().wait, daemon=True, name='pump').start()", "the imports started a thread (pump)"),
    "bare-thread": ("import _thread, time; _thread.start_new_thread(time.sleep, (60,))", "the imports started"),
    "connection": ("import socket; pair = socket.socketpair()", "the imports opened a connection"),
    "process": ("import subprocess; child = subprocess.Popen(['sleep', '60'])", "the imports started a process"),
}


@pytest.mark.parametrize("how", UNFIT)
def test_f30_preload_that_cannot_be_forked_is_a_plain_start_with_its_reason(shared_daemon: Host, how: str) -> None:
    text, reason = UNFIT[how]
    name = "unfit_" + how.replace("-", "_")
    path = installed(shared_daemon, name, text)
    preload = f"{name}_" if how == "missing" else name
    result = shared_daemon.run(
        HEAD + f"out = remote(pool({name!r}, preload={preload!r}))(lambda: 'served')().result()\nprint(json.dumps([out.status, out.output]))",
        PYTHONPATH=path,
    )
    assert result.json == ["COMPLETED", "served"]
    worker = worker_of(shared_daemon, name)
    assert worker["start"] == "plain"
    assert reason in worker["start_reason"]
    assert shared_daemon.process is not None
    assert not [child for child in psutil.Process(shared_daemon.process.pid).children() if child.name() == "sleep"]


@pytest.mark.skipif(not os.access("/dev", os.W_OK), reason="needs root: a file that looks like a device of CUDA's")
def test_f30_preload_that_touches_cuda_is_a_plain_start(shared_daemon: Host) -> None:
    device = f"/dev/nvidia-remoted-test-{os.getpid()}"
    path = installed(shared_daemon, "touches_cuda", f"kept = open({device!r}, 'a')")
    try:
        result = shared_daemon.run(HEAD + "print(json.dumps(remote(pool('cuda', preload='touches_cuda'))(lambda: 'served')().result().unwrap()))", PYTHONPATH=path)
    finally:
        os.unlink(device)
    assert result.json == "served"
    worker = worker_of(shared_daemon, "cuda")
    assert (worker["start"], worker["start_reason"]) == ("plain", f"the imports opened {device}: CUDA does not survive a fork")


def test_f30_preload_of_a_project_module_is_left_to_the_worker(shared_daemon: Host) -> None:
    """It is edited between runs (F17), so no server keeps it."""
    folder = shared_daemon.project
    script = HEAD + "import mine\ndef f(): return mine.VALUE\nprint(json.dumps(remote(pool('mine', preload='mine'))(f)().result().unwrap()))"
    path = os.pathsep.join([shared_daemon.environ["PYTHONPATH"], str(folder)])
    for value in (1, 2):
        shared_daemon.write("mine.py", f"VALUE = {value}")
        assert shared_daemon.run(script, PYTHONPATH=path).json == value
    assert "mine is a module of your project" in worker_of(shared_daemon, "mine")["start_reason"]


def test_f30_preload_that_changed_on_the_disk_is_imported_anew(shared_daemon: Host) -> None:
    path = installed(shared_daemon, "versioned", "VALUE = 1")
    script = HEAD + "def f():\n    import versioned\n    return versioned.VALUE\nprint(json.dumps(remote(pool(sys.argv[1], preload='versioned'))(f)().result().unwrap()))"
    file = shared_daemon.write("versioned_script.py", script)
    assert shared_daemon.run(file, "before", PYTHONPATH=path).json == 1
    installed(shared_daemon, "versioned", "VALUE = 1000")
    assert shared_daemon.run(file, "after", PYTHONPATH=path).json == 1000

    before, after = worker_of(shared_daemon, "before"), worker_of(shared_daemon, "after")
    assert (before["start"], after["start"]) == ("forked", "forked")
    assert before["fork_server"] != after["fork_server"]


def test_f30_preload_is_inferred_from_the_code(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
import numpy as np
def helper(): return np.arange(3)
def f(): return int(helper().sum()), sorted(name for name in sys.modules if name in ("numpy", "sklearn"))
print(json.dumps(remote(pool("inferred"))(f)().result().unwrap()))
"""
    )
    assert result.json == [3, ["numpy"]]
    worker = worker_of(shared_daemon, "inferred")
    server = next(server for server in ctl(shared_daemon, "workers")["fork_servers"] if server["id"] == worker["fork_server"])
    assert [*server["preload"], *server["inferred"]] == ["numpy"]  # one that was asked for serves as well


def test_f30_what_is_inferred_makes_no_other_kind(shared_daemon: Host) -> None:
    """Functions of one pool share its worker, whatever each of them imports."""
    result = shared_daemon.run(
        HEAD
        + """
import numpy as np
one = pool("one-kind")
print(json.dumps([remote(one)(f)().result().unwrap() for f in (lambda: os.getpid(), lambda: (np, os.getpid())[1])]))
"""
    )
    assert len(set(result.json)) == 1


def test_f30_preload_sees_the_variables_that_packages_read_at_import(shared_daemon: Host) -> None:
    path = installed(shared_daemon, "reads", "import os\nSEEN = os.environ.get('HF_HOME')")
    script = HEAD + "def f():\n    import reads\n    return reads.SEEN, os.environ.get('HF_HOME')\nprint(json.dumps(remote(pool(sys.argv[1], preload='reads'))(f)().result().unwrap()))"
    file = shared_daemon.write("reads_script.py", script)
    for name, value in (("reads-1", "/one"), ("reads-2", "/two")):
        assert shared_daemon.run(file, name, PYTHONPATH=path, HF_HOME=value).json == [value, value]
        assert worker_of(shared_daemon, name)["start"] == "forked"


def server_of(daemon: Host, pool: str) -> Any:
    worker = worker_of(daemon, pool)
    return next(server for server in ctl(daemon, "workers")["fork_servers"] if server["id"] == worker["fork_server"])


def test_c05_a_killed_fork_server_harms_no_worker_and_is_replaced(daemon: Host) -> None:
    gate = daemon.project / "gate"
    process = daemon.popen(
        HEAD
        + f"""
def wait():
    print("begun", flush=True)
    while not os.path.exists({str(gate)!r}): time.sleep(0.01)
    return os.getpid()
out = remote(pool("survivor"))(wait)().result()
print(json.dumps([out.status, out.output]))
"""
    )
    wait_until(lambda: [worker for worker in ctl(daemon, "workers")["workers"] if worker["state"] == "BUSY"], 20, daemon.log)
    server = server_of(daemon, "survivor")
    os.kill(server["pid"], signal.SIGKILL)
    wait_until(lambda: not psutil.pid_exists(server["pid"]), 10)
    result = daemon.run(HEAD + "print(json.dumps(remote(pool('next'))(os.getppid)().result().unwrap()))")
    gate.touch()
    out, err = process.communicate(timeout=30)

    assert json.loads(out.splitlines()[-1]) == ["COMPLETED", worker_of(daemon, "survivor")["pid"]], err
    assert daemon.process is not None
    assert result.json == daemon.process.pid
    assert worker_of(daemon, "next")["start"] == "forked"
    assert server_of(daemon, "next")["pid"] != server["pid"]


def test_c09_a_fork_server_ends_with_its_daemon_and_its_workers_do_not(daemon: Host) -> None:
    gate = daemon.project / "gate"
    process = daemon.popen(
        HEAD
        + f"""
def wait():
    while not os.path.exists({str(gate)!r}): time.sleep(0.01)
    return os.getpid()
out = remote(pool("orphan", preload="numpy"))(wait)().result()
print(json.dumps([out.status, out.output, out.attempts]))
"""
    )
    wait_until(lambda: [worker for worker in ctl(daemon, "workers")["workers"] if worker["state"] == "BUSY"], 20, daemon.log)
    worker, server = worker_of(daemon, "orphan"), server_of(daemon, "orphan")
    daemon.kill()
    wait_until(lambda: not psutil.pid_exists(server["pid"]), 10)
    assert psutil.pid_exists(worker["pid"])
    gate.touch()
    out, err = process.communicate(timeout=30)  # the client starts the next daemon
    end_daemon(daemon)

    assert json.loads(out.splitlines()[-1]) == ["COMPLETED", worker["pid"], 1], err


@pytest.mark.parametrize(("how", "said"), [("os._exit(7)", "exited with code 7"), ("os.kill(os.getpid(), 11)", "signal 11 (SIGSEGV)"), ("os.kill(os.getpid(), 9)", "signal 9 (SIGKILL)")])
def test_t55_the_end_of_a_forked_worker_has_its_name(shared_daemon: Host, how: str, said: str) -> None:
    result = shared_daemon.run(HEAD + f"out = remote(pool('ends', preload='numpy'), max_retries=0)(lambda: {how})().result()\nprint(json.dumps([out.status, out.state_reason, out.error]))")
    status, reason, error = result.json
    assert (status, reason) == ("FAILED", "WORKER_DIED")
    assert said in error


def test_t45_what_a_forked_worker_forked_is_found_by_its_mark(shared_daemon: Host) -> None:
    """Without exec its environment in /proc is that of the fork server, but for the name in it."""
    marks = shared_daemon.project / "left"
    result = shared_daemon.run(
        HEAD
        + f"""
def leave():
    if not os.fork():
        os.setsid()
        if os.fork(): os._exit(0)
        open({str(marks)!r}, "w").write(str(os.getpid()))
        time.sleep(600)
    while not (os.path.exists({str(marks)!r}) and open({str(marks)!r}).read()): time.sleep(0.01)
    os.kill(os.getpid(), 9)
print(json.dumps(remote(pool("leaves"), max_retries=0)(leave)().result().state_reason))
"""
    )
    assert result.json == "WORKER_DIED"
    wait_until(lambda: not psutil.pid_exists(int(marks.read_text())), 10)


def test_c05_an_idle_fork_server_ends_and_the_next_start_makes_another() -> None:
    with host("[limits]\nfork_server_idle_seconds = 0.1\nhousekeeping_seconds = 0.1\n") as made:
        made.start()
        script = made.write("idle.py", HEAD + "print(json.dumps(remote(pool(sys.argv[1], idleTimeout=int(sys.argv[2])))(os.getpid)().result().unwrap()))")
        made.run(script, "first", "1")
        wait_until(lambda: not ctl(made, "workers")["fork_servers"], 20, made.log)
        made.run(script, "second", "600")
        worker = worker_of(made, "second")
        assert worker["start"] == "forked"
        assert worker["fork_server"].endswith("-2")


def test_c05_with_as_many_fork_servers_as_may_be_the_idlest_makes_room() -> None:
    with host("[limits]\nfork_servers_total = 1\n") as made:
        made.start()
        made.run(HEAD + "print([remote(pool(f'p-{n}', preload=n))(os.getpid)().result().unwrap() for n in ('uuid', 'csv')])")
        servers = ctl(made, "workers")["fork_servers"]
        assert [server["preload"] for server in servers] == [["csv"]]
        assert worker_of(made, "p-csv")["start"] == "forked"


def test_c05_a_server_that_dies_while_it_forks_costs_no_job(shared_daemon: Host) -> None:
    """Its first fork is the one for trial; the next is a worker's."""
    text = "import os\nforks = []\ndef end():\n    forks.append(1)\n    if len(forks) == 2: os.kill(os.getpid(), 9)\nos.register_at_fork(after_in_parent=end)"
    path = installed(shared_daemon, "dies_late", text)
    result = shared_daemon.run(HEAD + "print(json.dumps(remote(pool('dies-late', preload='dies_late'))(lambda: 'served')().result().unwrap()))", PYTHONPATH=path)
    assert result.json == "served"
    assert worker_of(shared_daemon, "dies-late")["start"] in ("plain", "forked")


def test_f30_preload_without_effect_is_said_once_where_the_caller_is(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
queued = remote(pool("said", preload=["no_such_module"]))(lambda: 1)
called = remote(CpuLiveLoadBalancer(name="said-directly", workersMax=1, preload=["no_such_module_too"]))(lambda: 1)
silent = remote(pool("silent", preload=["json"]))(lambda: 1)
for call in (queued, called, silent, queued, called): call().result()
"""
    )
    lines = [line for line in result.err.splitlines() if "preload=" in line]
    assert lines == [
        f"remoted: preload= has no effect for <lambda>: cannot import {name}: ModuleNotFoundError: No module named '{name}'; its workers start without it"
        for name in ("no_such_module", "no_such_module_too")
    ]


def test_f30_a_plain_worker_imports_asyncio_when_a_body_wants_it() -> None:
    """It is a third of what a plain start takes."""
    with host("[limits]\nfork_servers_total = 0\n") as made:
        result = made.start().run(
            HEAD
            + """
def plain(): return "asyncio" in sys.modules
async def waiting():
    import asyncio
    await asyncio.sleep(0)
    return id(asyncio.get_running_loop())
def asking():
    import asyncio
    return id(asyncio.get_event_loop())
print(json.dumps([remote(pool("one"))(f)().result().unwrap() for f in (plain, waiting, waiting, asking)]))
"""
        )
    before, first, again, asked = result.json

    assert before is False
    assert first == again == asked, "the loop lives as long as the worker, and is the main thread's"
