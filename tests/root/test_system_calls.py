"""What a warm leased call asks of the kernel: the shape of the fast path, which no timing can show (DESIGN section 6)."""

from __future__ import annotations

import re
import subprocess
from collections import Counter
from pathlib import Path

import pytest

from tests.harness import Host, wait_until

pytestmark = pytest.mark.root

CALLS = 200
SCRIPT = f"""
import os, sys, time
from remoted_client import remote, CpuLiveLoadBalancer
@remote(CpuLiveLoadBalancer(name="lease", workersMax=1))
def noop(x): return x
@remote(CpuLiveLoadBalancer(name="lease", workersMax=1))
def pid(): return os.getpid()
for n in range(50): assert noop(n).result() == n
open("worker", "w").write(str(pid().result()))
while not os.path.exists("traced"): assert noop(0).result() == 0  # the lease stays warm while the tracer attaches
for n in range(50): noop(n).result()
open("begin", "w").close()
for n in range({CALLS}): assert noop(n).result() == n
open("end", "w").close()
for n in range(50): noop(n).result()
open("worker-end", "w").close()
"""


def _between(path: Path, begin: str, end: str) -> Counter[str]:
    """System calls by name between two files that the script opens."""
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    first = next(number for number, line in enumerate(lines) if f'"{begin}"' in line)
    last = next(number for number, line in enumerate(lines) if f'"{end}"' in line)
    return Counter(match[1] for line in lines[first + 1 : last] if (match := re.search(r"(?:^|\s)([a-z_0-9]+)\(", line)) and "resumed" not in line)


def _is_traced(pid: int) -> bool:
    return "TracerPid:\t0\n" not in Path(f"/proc/{pid}/status").read_text(encoding="ascii", errors="replace")


def _per_call(counts: Counter[str], *names: str) -> float:
    return sum(counts[name] for name in names) / CALLS


def test_a_warm_leased_call_is_one_send_and_one_receive_on_each_side(daemon: Host) -> None:
    """Whoever waits reads, nobody is woken in between, and the daemon hears nothing of it."""
    client_trace, worker_trace, daemon_trace = (daemon.folder / f"{who}.trace" for who in ("client", "worker", "daemon"))
    script = daemon.write("script.py", SCRIPT)
    client = daemon.popen(script)
    wait_until(lambda: (daemon.project / "worker").exists() and (daemon.project / "worker").read_text(encoding="ascii"), 30)
    worker = int((daemon.project / "worker").read_text(encoding="ascii"))
    assert daemon.process is not None
    tracers = [
        subprocess.Popen(["strace", "-qq", "-f", "-o", str(path), "-p", str(pid)], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for path, pid in ((client_trace, client.pid), (worker_trace, worker), (daemon_trace, daemon.process.pid))
    ]
    wait_until(lambda: all(_is_traced(pid) for pid in (client.pid, worker, daemon.process.pid)), 30)
    (daemon.project / "traced").touch()
    _, err = client.communicate(timeout=60)
    for tracer in tracers:
        tracer.terminate()
        tracer.wait()
    assert client.returncode == 0, err

    calls = _between(client_trace, "begin", "end")
    assert _per_call(calls, "sendto", "sendmsg", "write") == pytest.approx(1.0, abs=0.1), calls
    assert _per_call(calls, "recvmsg", "recvfrom") == pytest.approx(1.0, abs=0.1), calls
    assert _per_call(calls, "futex", "epoll_wait") <= 0.5, calls
    # How often a look asks is the machine's matter: every poll in vain is followed by a yield, so what is left over is looks that ended.
    assert calls["poll"] - calls["sched_yield"] <= 1.1 * CALLS, calls
    answers = Counter(re.findall(r"\b(sendto|sendmsg|recvmsg|futex|read|write)\(", worker_trace.read_text(encoding="utf-8", errors="replace")))
    assert answers["recvmsg"] <= 1.1 * answers["sendto"] + 20, answers
    assert answers["futex"] <= 0.1 * answers["sendto"] + 20, answers
    heard = daemon_trace.read_text(encoding="utf-8", errors="replace")
    assert heard.count("recvmsg(") < CALLS // 4, "the daemon heard of the calls"
