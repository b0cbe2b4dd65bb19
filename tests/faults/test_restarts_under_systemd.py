"""The daemon ends and comes back while its service manager keeps the workers' descriptors: nobody notices (decision 0040)."""

from __future__ import annotations

import json
import os
import select
import signal
import socket
import sqlite3
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.fakes.service_manager import ServiceManager
from tests.harness import Host, wait_until

BOTH = pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "restarted"])
HEAD = """
import json, os, sys, time
from remoted_client import *
from remoted_client import remote, context, CpuLiveServerless, CpuLiveLoadBalancer, Job
queue = CpuLiveServerless(name="queue", workersMax=2)
one = CpuLiveServerless(name="one", workersMax=1)
direct = CpuLiveLoadBalancer(name="direct", workersMax=1)
def mark(path, *words):
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, (" ".join(map(str, words)) + "\\n").encode())
    os.close(fd)
"""
WARM = (
    HEAD
    + """
model = None
@remote(one, max_retries=0)
def warm():
    global model
    model = (model or 0) + 1
    return [os.getpid(), model, context.running_call().id]
for gate in sys.argv[1:]:
    print(json.dumps(warm().result().unwrap()), flush=True)
    while not os.path.exists(gate): time.sleep(0.01)
print(json.dumps(warm().result().unwrap()), flush=True)
"""
)


@pytest.fixture
def manager(bare_host: Host) -> Iterator[ServiceManager]:
    bare_host.config.write_text("[limits]\nlease_idle_seconds = 30\n", encoding="utf-8")  # a slow machine is not an idle client
    made = ServiceManager(bare_host)
    made.start()
    yield made
    bare_host.stop()
    made.close()


def lines_of(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def shown_workers(host: Host) -> list[tuple[str, int, str]]:
    """As ``remotectl workers`` shows them."""
    command = [sys.executable, "-c", "from remoted.cli import main; main()", "workers", "--json"]
    answer = subprocess.run(command, env=host.environ, capture_output=True, text=True, check=True)
    return [(worker["id"], worker["pid"], worker["state"]) for worker in json.loads(answer.stdout)["workers"]]


@BOTH
def test_c09_an_idle_worker_stays_warm_over_a_restart(manager: ServiceManager, how: signal.Signals) -> None:
    """Same process, same id, same globals; again after the second restart, and its pool needs no other."""
    host = manager.host
    gates = [host.project / "first", host.project / "second"]
    client = host.popen(host.write("warm.py", WARM), *map(str, gates))
    assert client.stdout is not None
    pid, count, _ = json.loads(client.stdout.readline())
    assert count == 1
    kept = manager.names()
    assert len(kept) == 1
    for goal, gate in enumerate(gates, 2):
        manager.restart(how)
        assert shown_workers(host) == [(name, pid, "IDLE") for name in kept]
        gate.touch()
        assert json.loads(client.stdout.readline())[:2] == [pid, goal], host.log()
    client.communicate(timeout=20)
    assert manager.names() == kept


def test_c09_a_service_that_is_stopped_for_good_ends_its_idle_workers(manager: ServiceManager) -> None:
    """The store is dropped then, and the channel ends as without systemd."""
    host = manager.host
    pid = host.run(host.write("warm.py", WARM)).json[0]
    worker = psutil.Process(pid)
    manager.end(signal.SIGTERM)
    assert worker.is_running()

    manager.drop()

    worker.wait(10)


def test_c09_a_worker_that_died_meanwhile_leaves_nothing_in_the_store(manager: ServiceManager) -> None:
    host = manager.host
    script = host.write("warm.py", WARM)
    pid = host.run(script).json[0]
    manager.end(signal.SIGKILL)
    worker = psutil.Process(pid)
    worker.kill()
    worker.wait(10)

    manager.start()

    wait_until(lambda: not manager.names(), 10, host.log)
    assert host.run(script).json[0] != pid


@BOTH
def test_c09_a_running_job_goes_on_and_its_output_stays_live(manager: ServiceManager, how: signal.Signals) -> None:
    """It prints all along, more than a pipe holds while nobody reads; the client that waits sees each line once and in order."""
    host = manager.host
    marks = host.project / "marks"
    client = host.popen(
        HEAD
        + f"""
@remote(one, max_retries=0)
def talk(path):
    n = 0
    while not os.path.exists("enough"):
        print("line", n, "x" * 200)
        n += 1
        if n % 100 == 0: mark(path, os.getpid(), n); time.sleep(0.005)
    return [os.getpid(), n, context.running_call().id]
h = talk({str(marks)!r})
out = h.result()
print("RESULT", json.dumps([out.output, out.attempts, out.stdout.count("\\n")]), flush=True)
assert out.stdout == "".join(f"line {{n}} {{'x' * 200}}\\n" for n in range(out.output[1])), "a line is missing or twice"
out = talk({str(marks)!r}).result()
print("RESULT", json.dumps(out.output[:2]), flush=True)
"""
    )
    assert client.stdout is not None
    wait_until(lambda: len(lines_of(marks)) > 5, 20, host.log)
    pid = int(lines_of(marks)[0][0])
    for _ in range(2):
        manager.end(how)
        manager.start()
        before = len(lines_of(marks))
        wait_until(lambda before=before: len(lines_of(marks)) > before + 5, 20, host.log)
    (host.project / "enough").touch()
    out, err = client.communicate(timeout=40)
    assert client.returncode == 0, err[-3000:] + host.log()
    first, second = [json.loads(line.removeprefix("RESULT ")) for line in out.splitlines() if line.startswith("RESULT")]
    assert first[0][0] == second[0] == pid
    assert first[1:] == [1, first[0][1]]


@BOTH
def test_c09_a_job_that_was_taken_over_can_be_cancelled_and_its_worker_lives(manager: ServiceManager, how: signal.Signals) -> None:
    host = manager.host
    marks = host.project / "marks"
    job = host.run(
        HEAD
        + f"""
@remote(one, max_retries=0)
def f():
    mark({str(marks)!r}, os.getpid())
    time.sleep(600)
print(f.options(detach=True)().id)
"""
    ).out.strip()
    wait_until(lambda: len(lines_of(marks)) == 1, 20, host.log)
    manager.restart(how)
    result = host.run(
        HEAD
        + f"""
h = Job.from_id({job!r})
before = h.status()
h.cancel()
out = h.result()
print(json.dumps([before, out.status, out.attempts]))
"""
    )
    assert result.json == ["IN_PROGRESS", "CANCELLED", 1]
    assert host.run(host.write("warm.py", WARM)).json[0] == int(lines_of(marks)[0][0])


@BOTH
def test_c09_two_hundred_queued_jobs_each_end_once(manager: ServiceManager, how: signal.Signals) -> None:
    """Restarts at whatever moment: no token runs twice, and without a death of a worker nothing is lost and nothing tried again."""
    host = manager.host
    marks = host.project / "marks"
    client = host.popen(
        HEAD
        + f"""
@remote(queue, max_retries=0)
def once(n):
    mark({str(marks)!r}, context.running_call().attempt, context.running_call().id, os.getpid())
    time.sleep(0.005)
    return n
handles = [once(n) for n in range(200)]
print(json.dumps([[o.id, o.status, o.state_reason, o.attempts, o.output] for o in (h.result() for h in handles)]))
"""
    )
    for goal in (20, 60, 100):
        wait_until(lambda goal=goal: len(lines_of(marks)) >= goal, 40, host.log)
        manager.restart(how)
    out, err = client.communicate(timeout=60)
    assert client.returncode == 0, err[-3000:] + host.log()
    found = json.loads(out.splitlines()[-1])
    lines = lines_of(marks)
    assert Counter((status, reason, attempts) for _, status, reason, attempts, _ in found) == {("COMPLETED", "", 1): 200}
    assert [output for *_, output in found] == list(range(200))
    assert len({attempt for attempt, *_ in lines}) == len(lines) == 200
    assert {job for _, job, _ in lines} == {job for job, *_ in found}
    assert len({pid for *_, pid in lines}) <= 2, "the same two workers all along"
    host.stop()
    with sqlite3.connect(host.state / "remoted" / "remoted.sqlite3") as db:
        assert db.execute("SELECT count(*) FROM attempts JOIN jobs ON seq = job WHERE attempts.ended_at IS NULL AND jobs.ended_at IS NULL").fetchone() == (0,)
        assert db.execute("SELECT count(*) FROM attempts").fetchone() == (200,)
    db.close()


def test_c09_a_job_that_runs_when_the_service_is_stopped_for_good_leaves_its_outcome(manager: ServiceManager) -> None:
    """As without systemd: it finishes alone, however much it prints, and the next daemon finds what it left."""
    host = manager.host
    marks, gate = host.project / "marks", host.project / "gate"
    job = host.run(
        HEAD
        + f"""
@remote(one, max_retries=0)
def f():
    mark({str(marks)!r}, os.getpid())
    while not os.path.exists({str(gate)!r}): time.sleep(0.01)
    for n in range(20_000): print("line", n)
    return n
print(f.options(detach=True)().id)
"""
    ).out.strip()
    wait_until(lambda: len(lines_of(marks)) == 1, 20, host.log)
    worker = psutil.Process(int(lines_of(marks)[0][0]))
    manager.end(signal.SIGTERM)
    gate.touch()
    manager.drop()
    worker.wait(20)
    manager.start()
    result = host.run(
        HEAD
        + f"""
out = Job.from_id({job!r}).result()
said, meant = out.stdout, "".join(f"line {{n}}\\n" for n in range(20_000))
at = len(os.path.commonprefix([said, meant]))
print(json.dumps([out.status, out.output, out.attempts, "" if said == meant else f"{{len(said)}} characters, {{said[at:at + 40]!r}} for {{meant[at:at + 40]!r}} at {{at}}"]))
"""
    )
    assert result.json == ["COMPLETED", 19_999, 1, ""]


@BOTH
def test_f21_a_stream_goes_on_without_a_gap(manager: ServiceManager, how: signal.Signals) -> None:
    """Items on their way to the dead daemon are repeated to the next one; none comes twice."""
    host = manager.host
    client = host.popen(
        HEAD
        + """
@remote(one, max_retries=0)
def count():
    n = 0
    while not os.path.exists("enough"):
        yield [n, os.getpid(), "x" * (100_000 if n % 10 == 0 else 10)]
        n += 1
    yield [n, os.getpid(), ""]
h = count()
seen = []
for item in h:
    seen.append(item[0])
    if len(seen) in (50, 300, 600): print(len(seen), flush=True)
print(json.dumps([seen == list(range(len(seen))), h.result().status]))
"""
    )
    assert client.stdout is not None
    for _ in range(2):
        assert client.stdout.readline().strip().isdigit()
        manager.restart(how)
    assert client.stdout.readline().strip() == "600"
    (host.project / "enough").touch()
    out, err = client.communicate(timeout=40)
    assert client.returncode == 0, err[-3000:] + host.log()
    assert json.loads(out.splitlines()[-1]) == [True, "COMPLETED"]


@BOTH
@pytest.mark.parametrize("asynchronous", [False, True], ids=["sync", "async"])
def test_f06_calls_in_a_loop_notice_nothing_of_a_restart(manager: ServiceManager, how: signal.Signals, asynchronous: bool) -> None:
    """The lease goes on under its worker: each call runs once, in the same process, and what it prints arrives."""
    host = manager.host
    marks, enough = host.project / "marks", host.project / "enough"
    call = "await f(n)" if asynchronous else "f(n).result()"
    client = host.popen(
        HEAD
        + f"""
import asyncio
@remote(direct)
def f(n):
    mark({str(marks)!r}, n, os.getpid(), context.running_call().id)
    print("call", n)
    return n
async def loop():
    n = 0
    while not os.path.exists({str(enough)!r}):
        assert {call} == n
        n += 1
        await asyncio.sleep(0.002)
    return n
print("RESULT", asyncio.run(loop()))
"""
    )
    wait_until(lambda: len(lines_of(marks)) > 20, 20, host.log)
    for _ in range(3):
        manager.restart(how)
        before = len(lines_of(marks))
        wait_until(lambda before=before: len(lines_of(marks)) > before + 50, 20, host.log)
    enough.touch()
    out, err = client.communicate(timeout=30)
    assert client.returncode == 0, err[-3000:] + host.log()
    lines = lines_of(marks)
    (count,) = [int(line.split()[1]) for line in out.splitlines() if line.startswith("RESULT")]
    assert [int(n) for n, *_ in lines] == list(range(count))
    assert len({(pid, lease) for _, pid, lease in lines}) == 1, "one worker, one lease"
    assert [line for line in out.splitlines() if line.startswith("call")] == [f"call {n}" for n in range(count)]


def test_f06_the_next_daemon_takes_a_lease_back_when_others_wait(manager: ServiceManager) -> None:
    """It watches what it has taken over: the turn of one client ends for the other."""
    host = manager.host
    marks, enough = host.project / "marks", host.project / "enough"
    client = host.popen(
        HEAD
        + f"""
@remote(direct)
def f(n):
    mark({str(marks)!r}, n)
n = 0
while not os.path.exists({str(enough)!r}):
    f(n).result()
    n += 1
"""
    )
    wait_until(lambda: len(lines_of(marks)) > 20, 20, host.log)
    manager.restart(signal.SIGKILL)
    other = host.write("other.py", HEAD + "@remote(direct)\ndef g(): return os.getpid()\nprint(g().result())")
    assert host.run(other).out.strip().isdigit()
    enough.touch()
    _, err = client.communicate(timeout=30)
    assert client.returncode == 0, err[-3000:] + host.log()
    assert [int(n) for (n,) in lines_of(marks)] == list(range(len(lines_of(marks))))


def test_f26_the_time_of_a_leased_call_runs_on_over_a_restart(manager: ServiceManager) -> None:
    """The page says when it began; its worker survives."""
    host = manager.host
    marks = host.project / "marks"
    client = host.popen(
        HEAD
        + f"""
@remote(direct, timeout=6)
def f():
    mark({str(marks)!r}, os.getpid())
    time.sleep(600)
@remote(direct)
def g(): return os.getpid()
try: f().result()
except Exception as error: print(json.dumps([type(error).__name__, g().result()]))
"""
    )
    wait_until(lambda: len(lines_of(marks)) == 1, 20, host.log)
    manager.restart(signal.SIGKILL)
    out, err = client.communicate(timeout=40)
    assert client.returncode == 0, err[-3000:] + host.log()
    assert json.loads(out.splitlines()[-1]) == ["JobTimedOut", int(lines_of(marks)[0][0])], err


@BOTH
def test_f20_an_object_of_a_remote_class_lives_on_in_its_worker(manager: ServiceManager, how: signal.Signals) -> None:
    """Of two workers of the pool only one has it, and its calls go there."""
    host = manager.host
    gate = host.project / "gate"
    client = host.popen(
        HEAD
        + f"""
@remote(queue, max_retries=0)
class Counter:
    def __init__(self): self.count = 0
    def add(self):
        self.count += 1
        return [os.getpid(), self.count]
@remote(queue, max_retries=0)
def nap():
    time.sleep(0.3)
    return os.getpid()
counters = [Counter() for _ in range(4)]
assert len({{nap_.result().unwrap() for nap_ in [nap() for _ in range(4)]}}) == 2
before = [c.add().result().unwrap() for c in counters]
print("before", flush=True)
while not os.path.exists({str(gate)!r}): time.sleep(0.01)
after = [c.add().result() for c in reversed(counters)][::-1]
print(json.dumps([before, [o.unwrap() for o in after]]))
"""
    )
    assert client.stdout is not None
    assert client.stdout.readline() == "before\n"
    manager.restart(how)
    gate.touch()
    out, err = client.communicate(timeout=30)
    assert client.returncode == 0, err[-3000:] + host.log()
    before, after = json.loads(out.splitlines()[-1])
    assert after == [[pid, count + 1] for pid, count in before]


@BOTH
def test_f20_calls_of_an_instance_go_on_over_their_lease(manager: ServiceManager, how: signal.Signals) -> None:
    """One is in hand meanwhile; the next daemon knows the object, what it had been told to drop, and settles others beside it."""
    host = manager.host
    begun, gate = host.project / "begun", host.project / "gate"
    client = host.popen(
        HEAD
        + f"""
@remote(direct)
class Counter:
    def __init__(self): self.count = 0
    def add(self, wait=False):
        while wait and not os.path.exists({str(gate)!r}):
            mark({str(begun)!r}, 1)
            time.sleep(0.01)
        self.count += 1
        return [os.getpid(), self.count]
    def close(self): mark({str(host.project / "closed")!r}, self.count)
kept, dropped = Counter(), Counter()
found = [kept.add().result(), dropped.add().result()]
del dropped
found += [kept.add(wait=True).result(), kept.add().result()]
other = Counter()
found.append(other.add().result())
other.close()
found += [Counter().add().result(), kept.add().result()]
print(json.dumps(found))
"""
    )
    wait_until(begun.exists, 30)
    manager.restart(how)
    gate.touch()
    out, err = client.communicate(timeout=60)
    assert client.returncode == 0, err[-3000:] + host.log()
    found = json.loads(out)
    assert len({pid for pid, _ in found}) == 1
    assert [count for _, count in found] == [1, 1, 2, 3, 1, 1, 4]
    assert lines_of(host.project / "closed")[:2] == [["1"], ["1"]]


def test_t63_a_worker_whose_rows_name_another_process_is_not_taken_over(manager: ServiceManager) -> None:
    """It sees the end of its channel and finishes alone; what the rows name is looked for in vain."""
    host = manager.host
    marks, gate = host.project / "marks", host.project / "gate"
    job = host.run(
        HEAD
        + f"""
@remote(one, max_retries=0)
def f():
    mark({str(marks)!r}, os.getpid())
    while not os.path.exists({str(gate)!r}): time.sleep(0.01)
print(f.options(detach=True)().id)
"""
    ).out.strip()
    wait_until(lambda: len(lines_of(marks)) == 1, 20, host.log)
    worker = psutil.Process(int(lines_of(marks)[0][0]))
    manager.end(signal.SIGKILL)
    with sqlite3.connect(host.state / "remoted" / "remoted.sqlite3") as db:
        db.execute("UPDATE attempts SET worker_started = worker_started - 1")
    db.close()
    manager.start()
    gate.touch()
    worker.wait(20)
    assert manager.names() == set()
    assert host.run(HEAD + f"print(json.dumps(Job.from_id({job!r}).result().state_reason))").json == "LOST"


def test_c09_who_waits_for_a_daemon_that_cannot_start_is_told_so_and_where_to_look(bare_host: Host) -> None:
    """systemd holds the sockets: connecting succeeds, and nobody answers. No terminal is needed to hear of it."""
    manager = ServiceManager(bare_host)
    process = bare_host.popen(HEAD + "@remote(one)\ndef f(): return 5\nprint(f().result().unwrap())\n")
    assert process.stderr is not None
    told = process.stderr.readline()

    assert "takes connections and has not answered yet, waiting ...; " in told
    assert "daemon.log may say why" in told
    manager.start()
    assert process.communicate(timeout=60) == ("5\n", "")
    bare_host.stop()
    manager.close()


def test_c09_a_daemon_that_ends_every_connection_unheard_is_an_error_that_says_so(bare_host: Host) -> None:
    bare_host.sockets.mkdir(mode=0o700)
    with socket.socket(socket.AF_UNIX) as listening:
        listening.bind(str(bare_host.sockets / "data.sock"))
        listening.listen(64)
        process = bare_host.popen("import remoted_client.connection as line\nline._RECONNECT_SECONDS = 0.5\n" + HEAD + "@remote(one)\ndef f(): return 5\nf().result()\n")
        end = os.pidfd_open(process.pid)
        while end not in select.select([listening, end], [], [], 60)[0]:
            listening.accept()[0].close()
        os.close(end)
        _, err = process.communicate(timeout=30)

    assert process.returncode == 1
    assert "before it had answered, again and again for 0.5 s; " in err.splitlines()[-1]
