"""Clients that die, stall, flood or leave early (F25, T13, T57)."""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from tests.faults.rawclient import RawClient, daemon_process, descriptors, prepare, raw, resident_bytes
from tests.harness import Host, wait_until

HEAD = """
import json, os, signal, sys, time
from remoted_client import *
from remoted_client import remote, CpuLiveServerless, CpuLiveLoadBalancer, Job
queue = CpuLiveServerless(name="queue", workersMax=2)
direct = CpuLiveLoadBalancer(name="direct", workersMax=2)
"""


def sleepy(path: str) -> None:
    with open(path, "a", encoding="utf-8") as file:
        file.write(f"{os.getpid()}\n")
    time.sleep(600)


def test_f25_the_callers_death_cancels_blocking_calls_and_not_detached_ones(shared_daemon: Host) -> None:
    process = shared_daemon.popen(
        HEAD
        + """
@remote(queue)
def f(x):
    time.sleep(x)
    return x
blocking, detached, queued = f(600), f.options(detach=True)(1), f(601)
print(json.dumps([blocking.id, detached.id, queued.id]), flush=True)
blocking.result()
"""
    )
    assert process.stdout is not None
    ids = json.loads(process.stdout.readline())
    process.kill()
    process.communicate()
    result = shared_daemon.run(HEAD + f"print(json.dumps([[o.status, o.state_reason] for o in (Job.from_id(i).result() for i in {ids})]))")
    assert result.json == [["CANCELLED", "CALLER_GONE"], ["COMPLETED", result.json[1][1]], ["CANCELLED", "CALLER_GONE"]]


def test_f25_the_callers_death_stops_a_direct_call(shared_daemon: Host) -> None:
    mark = shared_daemon.project / "direct"
    process = shared_daemon.popen(
        HEAD
        + f"""
@remote(direct)
def f():
    open({str(mark)!r}, "w").write(f"{{os.getpid()}}\\n")
    try: time.sleep(600)
    except BaseException as error: open({str(mark)!r}, "a").write(type(error).__name__ + "\\n")
    raise SystemExit
f().result()
"""
    )
    wait_until(lambda: mark.exists() and "\n" in mark.read_text(encoding="utf-8"), 20, shared_daemon.log)
    process.kill()
    process.communicate()
    wait_until(lambda: "KeyboardInterrupt" in mark.read_text(encoding="utf-8"), 10, shared_daemon.log)


def test_f25_a_client_that_dies_before_its_acknowledgement_is_still_a_dead_caller(shared_daemon: Host) -> None:
    """The connection is closed between the submission and its commit: nobody would ever stop the call."""
    for number in range(20):
        mark = shared_daemon.project / f"unheard-{number}"
        pid = os.fork()
        if pid == 0:
            try:
                RawClient(shared_daemon).submit(prepare(sleepy, str(mark), detach=False))
            finally:
                os._exit(0)
        os.waitpid(pid, 0)
    result = shared_daemon.run(
        HEAD
        + """
@remote(queue)
def f(): return 1
print(f().result(timeout=50).output)
"""
    )
    assert result.out.strip() == "1", "the pool is not held by calls of the dead"


def test_f25_a_closed_connection_of_a_living_caller_cancels_nothing(shared_daemon: Host) -> None:
    call = prepare(pow, 2, 10, detach=False)
    with raw(shared_daemon) as client:  # a worker is there, and what bears it
        client.submit(call)
        client.until("done")
    before = descriptors(shared_daemon)
    for _ in range(10):
        with raw(shared_daemon) as client:
            client.submit(call)
            job = client.until("accepted").header["id"]
        with raw(shared_daemon) as client:
            client.send({"op": "watch", "id": job, "mine": True})
            assert client.until("done").header["status"] == "COMPLETED"
    wait_until(lambda: descriptors(shared_daemon) <= before + 6, 5, lambda: f"{descriptors(shared_daemon)} > {before}")


def test_five_thousand_results_reach_a_consumer_that_is_stopped_meanwhile(shared_daemon: Host) -> None:
    """Ctrl-Z and fg: 50 MB of results wait somewhere, none is lost, and the daemon stays small."""
    before = resident_bytes(shared_daemon)
    marks = shared_daemon.project / "stopped"
    process = shared_daemon.popen(
        HEAD
        + f"""
@remote(queue)
def f(n):
    with open({str(marks)!r}, "a") as file: file.write("x")
    return bytes([n % 251]) * 10_000
count = 0
for n, out in enumerate(f.map(range(5000))):
    assert out.output == bytes([n % 251]) * 10_000, n
    count += 1
print(count)
"""
    )
    for goal in (50, 1500, 3000):
        wait_until(lambda goal=goal: marks.exists() and marks.stat().st_size >= goal, 60, shared_daemon.log)
        process.send_signal(signal.SIGSTOP)
        wait_until(lambda: _settled(marks), 60)
        process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=100)
    assert (process.returncode, out.strip()) == (0, "5000"), err
    assert marks.stat().st_size == 5000, "every body ran once"
    assert resident_bytes(shared_daemon) - before < 96 << 20


_sizes: dict[str, tuple[int, float]] = {}


def _settled(path: object) -> bool:
    """Nothing has been added for half a second: everything that was asked for is done."""
    size, now = os.stat(str(path)).st_size, time.monotonic()
    known = _sizes.get(str(path))
    if known is None or known[0] != size:
        _sizes[str(path)] = (size, now)
        return False
    return now - known[1] > 0.5


def test_direct_results_reach_a_consumer_that_was_stopped(shared_daemon: Host) -> None:
    marks = shared_daemon.project / "stopped-direct"
    process = shared_daemon.popen(
        HEAD
        + f"""
@remote(direct)
def f(n):
    with open({str(marks)!r}, "a") as file: file.write("x")
    return bytes([n % 251]) * (100_000 if n % 10 == 0 else 30_000)
count = 0
for n, value in enumerate(f.map(range(600))):
    assert value == bytes([n % 251]) * (100_000 if n % 10 == 0 else 30_000), (n, len(value), value[:1])
    count += 1
print(count)
"""
    )
    wait_until(lambda: marks.exists() and marks.stat().st_size >= 20, 60, shared_daemon.log)
    process.send_signal(signal.SIGSTOP)
    wait_until(lambda: _settled(marks), 60)
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out.strip()) == (0, "600"), err + shared_daemon.log()
    assert marks.stat().st_size == 600


def test_f22_output_and_large_results_of_direct_calls_reach_a_slow_reader(shared_daemon: Host) -> None:
    """The record of a direct call is gone when it ends; a reader that lags behind still gets all of it."""
    mark = shared_daemon.project / "slow-reader"
    process = shared_daemon.popen(
        HEAD
        + f"""
@remote(direct)
def f():
    for n in range(40_000): print(f"line {{n:06}}", "." * 500)
    open({str(mark)!r}, "w").close()
    return bytes(200_000)
h = f()
import io
real, sys.stdout = sys.stdout, io.StringIO()
value = h.result()
shown, sys.stdout = sys.stdout.getvalue().splitlines(), real
print(json.dumps([len(value), len(shown), shown[0][:11], shown[-1][:11]]))
"""
    )
    wait_until(lambda: any(path.stat().st_size > 1_000_000 for path in (shared_daemon.state / "remoted" / "logs").glob("*")), 30)
    process.send_signal(signal.SIGSTOP)
    wait_until(mark.exists, 30)
    time.sleep(0.5)  # nothing tells from outside that the daemon has taken note of the end
    process.send_signal(signal.SIGCONT)
    out, err = process.communicate(timeout=60)
    assert json.loads(out) == [200_000, 40_000, "line 000000", "line 039999"], err


def test_f25_a_signal_handler_calls_and_waits_while_its_thread_waits(shared_daemon: Host) -> None:
    """That thread reads the line itself, and stands still meanwhile."""
    done = shared_daemon.run(
        HEAD
        + """
@remote(queue)
def until(path):
    while not os.path.exists(path): time.sleep(0.01)
    return "over"
@remote(CpuLiveServerless(name="beside"))
def queued(x): return x
@remote(direct)
def straight(x): return x
found = []
def handle(*_):
    found.append([queued(1).result().unwrap(), straight(2).result()])
    open(path, "w").close()
signal.signal(signal.SIGALRM, handle)
path = os.path.join(os.getcwd(), "go-on")
queued(0).result()
signal.setitimer(signal.ITIMER_REAL, 0.3)
found.append(until(path).result(60).unwrap())
print(json.dumps(found))
"""
    )
    assert done.json == [[1, 2], "over"]


def test_detached_calls_are_handed_over_before_a_script_ends(shared_daemon: Host) -> None:
    marks = shared_daemon.project / "detached"
    result = shared_daemon.run(
        HEAD
        + f"""
@remote(queue)
def f(n):
    with open({str(marks)!r}, "a") as file: file.write("x")
for n in range(500): f.options(detach=True)(n)
""",
    )
    assert result.err == ""
    wait_until(lambda: marks.exists() and marks.stat().st_size == 500, 40, shared_daemon.log)


def test_detached_calls_that_were_refused_are_told_when_the_script_ends(bare_host: Host) -> None:
    """Nobody looks at their handles, so nobody would ever hear of it."""
    bare_host.config.write_text("[limits]\nqueued_jobs_per_uid = 3\n", encoding="utf-8")
    result = bare_host.start().run(
        HEAD
        + """
@remote(queue)
def f(n): time.sleep(600)
for n in range(5): f.options(detach=True)(n)
""",
    )
    assert "2 detached calls were not taken" in result.err
    assert "queued_jobs_per_uid is 3" in result.err


def test_t57_open_connections_do_not_delay_the_end_of_the_daemon(daemon: Host) -> None:
    with raw(daemon), raw(daemon, greet=False), raw(daemon) as watcher:
        watcher.submit(prepare(sleepy, str(daemon.project / "sleepy")))
        watcher.until("accepted")
        begun = time.monotonic()
        daemon.stop()
        assert time.monotonic() - begun < 5


@pytest.mark.timeout(480)
def test_a_thousand_short_lived_clients_leave_nothing_behind(daemon: Host) -> None:
    """Each is a process that connects, calls and ends; ten at a time."""
    body = HEAD + """
@remote(CpuLiveLoadBalancer(name="brief", workersMax=2))
def double(x): return 2 * x
def clients(count):
    for start in range(0, count, 10):
        children = []
        for n in range(start, start + 10):
            child = os.fork()
            if not child:
                os._exit(double(n).result() != 2 * n)
            children.append(child)
        assert [os.waitpid(child, 0)[1] for child in children] == [0] * 10
clients(int(sys.argv[1]))
"""
    script = daemon.write("script.py", body)
    daemon.run(script, "50", timeout=60)
    process = daemon_process(daemon)
    wait_until(lambda: len(process.children()) <= 3, 15)  # two workers, and the fork server that bore them
    descriptors, memory = process.num_fds(), process.memory_info().rss
    daemon.run(script, "1000", timeout=400)
    wait_until(lambda: process.num_fds() <= descriptors + 2, 15, lambda: f"{process.num_fds()} descriptors after {descriptors}")
    assert process.memory_info().rss < memory + (16 << 20)
