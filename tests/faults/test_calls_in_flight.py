"""What passes through the daemon and is under way when it dies: queue-backed nested calls go on, everything else fails at once, by name."""

from __future__ import annotations

import concurrent.futures
import json
import signal
import subprocess
from typing import Any

import pytest

from tests.fakes.service_manager import ServiceManager
from tests.harness import Host, wait_until
from tests.surface.test_f07_serve import site_of

BOTH = pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "restarted"])
HEAD = """
import asyncio, json, os, sys, time
from remoted_client import *
from remoted_client import remote, CpuLiveServerless, CpuLiveLoadBalancer, Job
queue = CpuLiveServerless(name="queue", workersMax=2)
one = CpuLiveServerless(name="one", workersMax=1)
direct = CpuLiveLoadBalancer(name="direct", workersMax=1)
folder = sys.argv[1]
def mark(name):
    fd = os.open(folder + "/" + name, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, b"x")
    os.close(fd)
def wait_for(name):
    while not os.path.exists(folder + "/" + name): time.sleep(0.01)
"""


def finish(host: Host, process: subprocess.Popen[str]) -> Any:
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err[-3000:] + host.log()
    return json.loads(out.splitlines()[-1])


@BOTH
@pytest.mark.parametrize("inner", ["queue", "one"], ids=["another-worker", "the-parents-own-pool"])
@pytest.mark.parametrize("when", ["running", "waiting"])
def test_f29_a_nested_call_to_a_queue_goes_on_over_a_restart(manager: ServiceManager, how: signal.Signals, inner: str, when: str) -> None:
    """Whether it runs or waits, in another pool or its parent's own; neither it nor its parent runs twice."""
    host = manager.host
    program = f"""
@remote({inner}, max_retries=0)
def inside(x):
    mark("inside")
    wait_for("go")
    return x + 1
@remote(queue, max_retries=0)
def block():
    mark("block")
    wait_for("unblock")
@remote(one, max_retries=0)
def outside(x):
    mark("outside")
    return inside(x).result().unwrap() + 10
others = [block() for _ in range(2)] if {when!r} == "waiting" and {inner!r} == "queue" else []
while others and (not os.path.exists(folder + "/block") or os.path.getsize(folder + "/block") < 2): time.sleep(0.01)
handle = outside(1)
out = handle.result()
print(json.dumps([out.status, out.output, out.attempts, out.error]))
"""
    process = host.popen(HEAD + program, str(host.project))
    begun = host.project / ("outside" if when == "waiting" else "inside")
    wait_until(begun.exists, 30, host.log)
    manager.restart(how)
    (host.project / "unblock").touch()
    (host.project / "go").touch()

    assert finish(host, process) == ["COMPLETED", 12, 1, None]
    assert [len((host.project / name).read_bytes()) for name in ("inside", "outside")] == [1, 1]


@BOTH
def test_f29_a_nested_direct_call_fails_by_name_and_its_body_may_be_tried_again(manager: ServiceManager, how: signal.Signals) -> None:
    host = manager.host
    program = """
@remote(direct)
def inside(x):
    mark("inside")
    if os.path.getsize(folder + "/inside") == 1: time.sleep(600)
    return x + 1
@remote(one, max_retries=1)
def outside(x): return inside(x).result() + 10
@remote(one, max_retries=0)
def once(x): return inside(x).result() + 10
out = outside(1).result()
print(json.dumps([out.status, out.output, out.attempts]))
"""
    process = host.popen(HEAD + program, str(host.project))
    wait_until((host.project / "inside").exists, 30, host.log)
    manager.restart(how)

    assert finish(host, process) == ["COMPLETED", 12, 2]


@BOTH
def test_f20_a_method_of_a_direct_class_that_is_under_way_is_lost_by_name_and_the_object_lives_on(manager: ServiceManager, how: signal.Signals) -> None:
    """With an option that concerns the daemon it passes by there; on a lease it would go on."""
    host = manager.host
    program = """
@remote(direct)
class Counter:
    def __init__(self): self.count = 0
    def add(self, waits=False):
        self.count += 1
        mark("called")
        if waits: time.sleep(600)
        return [os.getpid(), self.count]
counter = Counter()
before = counter.add().result()
try: counter.add.options(priority=1)(waits=True).result()
except WorkerLost as error: lost = [error.reason, str(error)]
after = counter.add().result()
print(json.dumps([before, lost, after]))
"""
    process = host.popen(HEAD + program, str(host.project))
    wait_until(lambda: (host.project / "called").exists() and (host.project / "called").stat().st_size == 2, 30, host.log)
    manager.restart(how)

    before, (reason, text), after = finish(host, process)
    assert reason == "LOST"
    assert "the daemon went away while it ran a load-balanced call" in text
    assert after == [before[0], 3]


@BOTH
def test_f07_a_request_that_is_under_way_is_answered_at_once_and_not_made_twice(manager: ServiceManager, how: signal.Signals) -> None:
    host = manager.host
    called = host.project / "called"
    script = f"""
lb = CpuLiveLoadBalancer(name="lb", workersMax=1)
@remote(lb)
def held(x: int) -> int:
    with open({str(called)!r}, "a") as file: file.write("x")
    if x: time.sleep(600)
    return os.getpid()
"""
    with site_of(host, script) as site, concurrent.futures.ThreadPoolExecutor() as pool:
        before = site.ask("POST", "/held", {"x": 0}).json
        answer = pool.submit(site.ask, "POST", "/held", {"x": 1})
        wait_until(lambda: called.read_text() == "xx", 30, host.log)
        manager.restart(how)
        lost = answer.result(30)
        assert (lost.status, lost.json["error"]["code"]) == (502, "LOST"), lost
        wait_until(lambda: site.ask("POST", "/held", {"x": 0}).status == 200, 30, host.log)
        assert site.ask("POST", "/held", {"x": 0}).json == before
    assert called.read_text() == "xxxx"
