"""What a warm call asks of the kernel: its shape, which no timing can show (DESIGN section 6)."""

from __future__ import annotations

import json
import re
import subprocess
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import pytest

from tests.harness import Host, wait_until
from tests.integration.test_f30_preload import ctl

pytestmark = pytest.mark.root

CALLS = 200
SCRIPT = f"""
import os, sys, time
from remoted_client import remote, CpuLiveLoadBalancer, CpuLiveServerless
config = (CpuLiveServerless if sys.argv[1] == "queue" else CpuLiveLoadBalancer)(name="shape", workersMax=1)
@remote(config)
def noop(x): return x
@remote(config)
def pid(): return os.getpid()
def call(f, *a):
    found = f(*a).result()
    return found.unwrap() if sys.argv[1] == "queue" else found
for n in range(50): assert call(noop, n) == n
open("worker", "w").write(str(call(pid)))
while not os.path.exists("traced"): assert call(noop, 0) == 0  # it stays warm while the tracer attaches
for n in range(50): call(noop, n)
open("begin", "w").close()
for n in range({CALLS}): assert call(noop, n) == n
open("end", "w").close()
for n in range(50): call(noop, n)
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


class Traces(NamedTuple):
    """What strace has written of each."""

    client: Path
    worker: Path
    daemon: Path


def _trace(host: Host, kind: str) -> Traces:
    """Of the script, while it makes warm calls."""
    traces = Traces(*(host.folder / f"{who}.trace" for who in Traces._fields))
    client = host.popen(host.write("script.py", SCRIPT), kind)
    wait_until(lambda: (host.project / "worker").exists() and (host.project / "worker").read_text(encoding="ascii"), 30)
    worker = int((host.project / "worker").read_text(encoding="ascii"))
    assert host.process is not None
    pids = (client.pid, worker, host.process.pid)
    tracers = [
        subprocess.Popen(["strace", "-qq", "-f", "-o", str(path), "-p", str(pid)], stdin=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for path, pid in zip(traces, pids, strict=True)
    ]
    wait_until(lambda: all(_is_traced(pid) for pid in pids), 30)
    (host.project / "traced").touch()
    _, err = client.communicate(timeout=60)
    for tracer in tracers:
        tracer.terminate()
        tracer.wait()
    assert client.returncode == 0, err
    return traces


def _answers(trace: Path) -> Counter[str]:
    """System calls of a worker by which threads talk or wait for each other."""
    return Counter(re.findall(r"\b(sendto|sendmsg|recvmsg|futex|read|write)\(", trace.read_text(encoding="utf-8", errors="replace")))


def _threads_that(trace: Path, call: str, word: str) -> Counter[str]:
    """How often each thread of a process has sent or received (``call``) a frame that begins with ``word``."""
    text = trace.read_text(encoding="utf-8", errors="replace")
    return Counter(re.findall(rf'^(\d+) +(?:<\.\.\. )?{call}[( ].*?\{{\\"op\\":\\"{word}\\"', text, re.MULTILINE))


def test_a_warm_leased_call_is_one_send_and_one_receive_on_each_side(daemon: Host) -> None:
    """Whoever waits reads, nobody is woken in between, and the daemon hears nothing of it."""
    traces = _trace(daemon, "load-balanced")

    calls = _between(traces.client, "begin", "end")
    assert _per_call(calls, "sendto", "sendmsg", "write") == pytest.approx(1.0, abs=0.1), calls
    assert _per_call(calls, "recvmsg", "recvfrom") == pytest.approx(1.0, abs=0.1), calls
    assert _per_call(calls, "futex", "epoll_wait") <= 0.5, calls
    # How often a look asks is the machine's matter: every poll in vain is followed by a yield, so what is left over is looks that ended.
    assert calls["poll"] - calls["sched_yield"] <= 1.1 * CALLS, calls
    answers = _answers(traces.worker)
    assert answers["recvmsg"] <= 1.1 * answers["sendto"] + 20, answers
    assert answers["futex"] <= 0.1 * answers["sendto"] + 20, answers
    heard = traces.daemon.read_text(encoding="utf-8", errors="replace")
    assert heard.count("recvmsg(") < CALLS // 4, "the daemon heard of the calls"


def test_a_warm_durable_call_wakes_one_thread_of_the_client_and_one_of_the_worker(daemon: Host) -> None:
    """Whoever waits reads: what has come is looked at and taken when it was handled, and no other thread is told."""
    traces = _trace(daemon, "queue")

    calls = _between(traces.client, "begin", "end")
    assert _per_call(calls, "sendto", "sendmsg", "write") == pytest.approx(1.0, abs=0.1), calls
    assert _per_call(calls, "recvfrom") == pytest.approx(2.0, abs=1.0), calls  # a slow machine hears apart that it was accepted
    assert _per_call(calls, "recvmsg", "futex", "epoll_wait") <= 0.5, calls
    [caller] = _threads_that(traces.client, "sendto", "submit")
    told = _threads_that(traces.client, "recvfrom", "done")
    assert told[caller] >= 0.8 * told.total() > CALLS, told
    answers = _answers(traces.worker)
    assert answers["recvmsg"] <= 2 * answers["sendto"] + 20, answers  # the order, and what is kept of earlier ones
    # Which may come while a body runs, to the line's own thread: how often the two then wait for the interpreter is the machine's matter.
    [body] = _threads_that(traces.worker, "sendto", "done")
    ordered = _threads_that(traces.worker, "recvmsg", "run")
    assert ordered[body] >= 0.5 * ordered.total() > CALLS / 2, ordered


TOLD = """
import os, time
from remoted_client import remote, CpuLiveServerless
@remote(CpuLiveServerless(name="told", workersMax=2))
def body(seconds, words):
    if words: print(words, flush=True)
    time.sleep(seconds)
    return "over"
assert body(0, "").result().unwrap() == "over"
open("worker", "w").write(str(os.getppid()))
while not os.path.exists("traced"): time.sleep(0.01)
for seconds, words in ((0, ""), (0.05, ""), (0.05, "printed at once"), (0, "printed and over")):
    job = body(seconds, words)
    assert len(job.id) == 32 and job.result().unwrap() == "over"
detached = body.options(detach=True)(0.05, "")
assert len(detached.id) == 32
"""


def test_t49_nobody_is_told_of_what_is_not_on_the_disk(daemon: Host) -> None:
    """The order may leave before; the word that a call was accepted, what it prints and its end come behind a flush."""
    trace = daemon.folder / "daemon.trace"
    client = daemon.popen(daemon.write("told.py", TOLD))
    wait_until(lambda: (daemon.project / "worker").exists(), 30)
    assert daemon.process is not None
    tracer = subprocess.Popen(["strace", "-qq", "-f", "-s", "600", "-e", "trace=fdatasync,sendto,sendmsg,recvmsg", "-o", str(trace), "-p", str(daemon.process.pid)], stdin=subprocess.DEVNULL)
    wait_until(lambda: _is_traced(daemon.process.pid), 30)
    (daemon.project / "traced").touch()
    _, err = client.communicate(timeout=60)
    tracer.terminate()
    tracer.wait()
    assert client.returncode == 0, err

    told, early = [], 0
    is_flushed = {"submit": True, "done": True}  # since the newest call came, and since the newest end
    for line in trace.read_text(encoding="utf-8", errors="replace").splitlines():
        if "fdatasync" in line and "= 0" in line:
            is_flushed = {"submit": True, "done": True}
        for word in re.findall(r'\\"op\\":\\"(submit|accepted|done|output|run)\\"', line):
            if "recvmsg" in line:
                is_flushed[word] = False
            elif word == "run":
                early += not is_flushed["submit"]
            else:
                told.append(word)
                assert is_flushed["done" if word == "done" else "submit"], line
    assert told.count("accepted") >= 3
    assert "output" in told
    assert early, "a first attempt waited for the disk"


DISK = """
import json, os, sys, threading, time
from remoted_client import remote, CpuLiveServerless
@remote(CpuLiveServerless(name="disk", workersMax=3))
def body(name):
    if name: open(name, "w").close()
    return os.getpid()
def begun(name):
    while not os.path.exists(name): time.sleep(0.001)
    time.sleep(0.3)  # its body is over by then, and its end not yet on the disk
first = body("").result().unwrap()
while not os.path.exists("slow"): time.sleep(0.01)
found, over = [], []
def call(name):
    found.append(body(name).result().unwrap())
    over.append(name)
for number in range(3):
    threads = []
    for name in ("a%d" % number, "b%d" % number):
        threads.append(threading.Thread(target=call, args=(name,)))
        threads[-1].start()
        if name[0] == "a": begun(name)
    for thread in threads: thread.join()
print(json.dumps([set(found) == {first}, over]))
"""


def test_c07_a_worker_is_free_while_what_it_returned_waits_for_the_disk(daemon: Host) -> None:
    """The scheduler hears of the end before it places anybody: no second worker is started for whom the first could serve."""
    client = daemon.popen(daemon.write("disk.py", DISK))
    assert daemon.process is not None
    wait_until(lambda: ctl(daemon, "workers")["workers"], 30)
    tracer = subprocess.Popen(["strace", "-qq", "-f", "-o", "/dev/null", "-e", "trace=fdatasync", "-e", "inject=fdatasync:delay_enter=900000", "-p", str(daemon.process.pid)], stdin=subprocess.DEVNULL)
    wait_until(lambda: _is_traced(daemon.process.pid), 30)
    (daemon.project / "slow").touch()
    out, err = client.communicate(timeout=60)
    workers = ctl(daemon, "workers")["workers"]
    tracer.terminate()
    tracer.wait()

    assert client.returncode == 0, err
    assert json.loads(out) == [True, ["a0", "b0", "a1", "b1", "a2", "b2"]]
    assert len(workers) == 1
