"""T07: numbers of processes are recycled within a second, and nobody who has nothing to do with a job is ever signalled."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.harness import ROOT

pytestmark = pytest.mark.root

#: Before Linux 6.14 kernel.pid_max is the whole host's, and is left alone: the test is then a weaker one.
IS_OF_NAMESPACE = tuple(map(int, os.uname().release.split(".")[:2])) >= (6, 14)
#: In a namespace with 400 numbers for processes and threads.
DRIVER = '''
import json, os, sys, threading, time
from pathlib import Path
if sys.argv[2] == "True": Path("/proc/sys/kernel/pid_max").write_text("400")
from tests.harness import host

SCRIPT = """
import os, subprocess, sys, time
from remoted_client import remote, CpuLiveServerless
queue = CpuLiveServerless(name="q", workersMax=2)
@remote(queue, max_retries=0)
def waits(n):
    children = [subprocess.Popen(["/bin/sleep", "60"], start_new_session=n % 2 == 0) for _ in range(2)]
    time.sleep(60)
@remote(queue, max_retries=0)
def dies(n):
    subprocess.Popen(["/bin/sleep", "60"])
    os.kill(os.getpid(), 9)
@remote(queue, max_retries=0, timeout=0.2)
def late(n):
    subprocess.Popen(["/bin/sleep", "60"])
    time.sleep(60)
seen = []
for n in range(int(sys.argv[1])):
    running = waits(n)
    deadline = time.monotonic() + 30
    while running.status().value != "IN_PROGRESS" and time.monotonic() < deadline: time.sleep(0.005)
    time.sleep(0.05)
    running.cancel()
    other = (dies if n % 3 == 0 else late)(n)
    seen += [running.result(30).status, other.result(30).status]
import json
print(json.dumps(seen))
"""
ended, stop, wraps = [], threading.Event(), 0
def bystanders():
    """Short lives that all end by themselves, over the whole range of numbers."""
    global wraps
    last = 0
    while not stop.is_set():
        pids = []
        for _ in range(12):
            pid = os.fork()
            if not pid:
                time.sleep(0.02)
                os._exit(0)
            wraps += pid < last
            last = pid
            pids.append(pid)
        ended.extend(os.waitpid(pid, 0)[1] for pid in pids)
with host() as daemon:
    daemon.start()
    thread = threading.Thread(target=bystanders)
    thread.start()
    try: result = daemon.run(SCRIPT, sys.argv[1], timeout=150)
    finally:
        stop.set()
        thread.join()
print(json.dumps({"wraps": wraps, "bystanders": len(ended), "harmed": sum(status != 0 for status in ended), "seen": result.json}))
'''


def test_t07_recycled_pids_cost_no_bystander_his_life(tmp_path: Path) -> None:
    rounds = int(os.environ.get("REMOTED_TEST_PID_ROUNDS", "15"))
    driver = tmp_path / "driver.py"
    driver.write_text(DRIVER, encoding="utf-8")
    command = ["unshare", "--pid", "--fork", "--mount-proc", "--kill-child", sys.executable, str(driver), str(rounds), str(IS_OF_NAMESPACE)]
    done = subprocess.run(command, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True, timeout=200, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])

    assert found["wraps"] >= 3 or not IS_OF_NAMESPACE, found
    assert found["harmed"] == 0, found
    assert set(found["seen"][::2]) == {"CANCELLED"}
    assert set(found["seen"][1::2]) == {"FAILED", "TIMED_OUT"}
