"""SURFACE row C05 as it is seen from outside: which worker processes there are, and when."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path

import psutil

from tests.harness import Host, wait_until

HEAD = """
import os, sys, time
from remoted_client import remote, CpuLiveServerless
"""


def workers(host: Host) -> list[int]:
    """The pids of those that live and are not about to end."""
    command = [Path(sys.executable).with_name("remotectl"), "workers", "--json"]
    answer = subprocess.run(command, env=host.environ, capture_output=True, text=True, check=True)
    return [worker["pid"] for worker in json.loads(answer.stdout)["workers"] if worker["state"] in ("IDLE", "BUSY")]


def test_c05_workers_are_started_on_demand_and_reaped_after_their_idle_timeout(daemon: Host) -> None:
    assert workers(daemon) == []
    daemon.run(
        HEAD
        + """
@remote(CpuLiveServerless(name="brief", workersMax=2, idleTimeout=1))
def pid(seconds):
    time.sleep(seconds)
    return os.getpid()
assert len({o.unwrap() for o in pid.map([0.3] * 6)}) == 2
"""
    )
    wait_until(lambda: not workers(daemon), 15, lambda: f"left: {workers(daemon)}")


def test_c05_the_minimum_is_kept_while_the_script_lives_and_as_long_as_it_says_afterwards(daemon: Host) -> None:
    script = daemon.popen(
        HEAD
        + """
@remote(CpuLiveServerless(name="kept", workersMin=2, workersMax=3, idleTimeout=1, keep_warm_seconds=3))
def pid(): return os.getpid()
pid().result().unwrap()
print("called", flush=True)
while not os.path.exists("go"): time.sleep(0.05)
"""
    )
    assert script.stdout is not None
    assert script.stdout.readline() == "called\n"
    wait_until(lambda: len(workers(daemon)) == 2, 15)
    before = set(workers(daemon))
    deadline = time.monotonic() + 3  # three times the idle timeout, in which nothing may happen
    while time.monotonic() < deadline:
        assert set(workers(daemon)) == before
    (daemon.project / "go").touch()
    script.communicate(timeout=30)
    wait_until(lambda: not workers(daemon), 30, lambda: f"left: {workers(daemon)}")


def test_c05_a_dead_worker_of_the_minimum_is_replaced_unless_they_die_again_and_again(bare_host: Host) -> None:
    bare_host.config.write_text("[limits]\ncrash_loop_count = 3\ncrash_loop_seconds = 3600\n", encoding="utf-8")
    bare_host.start()
    script = bare_host.popen(
        HEAD
        + """
@remote(CpuLiveServerless(name="kept", workersMin=1, workersMax=1, keep_warm_seconds=600))
def pid(): return os.getpid()
print(pid().result().unwrap(), flush=True)
while not os.path.exists("go"): time.sleep(0.05)
print(pid().result().unwrap(), flush=True)
"""
    )
    assert script.stdout is not None
    last = int(script.stdout.readline())
    for _ in range(2):
        psutil.Process(last).kill()
        wait_until(lambda: workers(bare_host) not in ([], [last]), 15, bare_host.log)  # noqa: B023
        (last,) = workers(bare_host)
    psutil.Process(last).kill()
    deadline = time.monotonic() + 3
    while time.monotonic() < deadline:
        assert [pid for pid in workers(bare_host) if pid != last] == [], "the third death in a row is a loop"
    (bare_host.project / "go").touch()
    out, err = script.communicate(timeout=30)
    assert int(out) != last, "who waits for a worker still gets one"
    assert err == ""


def test_c05_workers_that_nested_calls_made_necessary_do_not_widen_the_pool(daemon: Host) -> None:
    """While bodies wait for calls of their own pool there are more workers than workersMax; ordinary calls still run so many at once."""
    result = daemon.run(
        HEAD
        + """
one = CpuLiveServerless(name="one", workersMax=1)
@remote(one)
def child(x): return x
@remote(one)
def parent(x): return child(x).result().unwrap()
@remote(one)
def busy(x):
    began = time.time()
    time.sleep(0.3)
    return began, time.time()
assert [o.unwrap() for o in parent.map(range(6))] == list(range(6))
spans = sorted(o.unwrap() for o in busy.map(range(5)))
print(all(later[0] >= earlier[1] - 0.01 for earlier, later in zip(spans, spans[1:])))
"""
    )
    assert result.out.strip() == "True"
    wait_until(lambda: len(workers(daemon)) == 1, 30, lambda: f"left: {workers(daemon)}")
