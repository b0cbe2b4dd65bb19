"""The daemon is killed without last words: what was acknowledged ends exactly once (MECHANISMS 7 and 8; C09)."""

from __future__ import annotations

import contextlib
import json
import signal
import sqlite3
import time
from collections import Counter
from pathlib import Path

import psutil
import pytest

from remoted.limits import Limits
from tests.faults.rawclient import daemon_process
from tests.harness import Host, wait_until

HEAD = """
import json, os, signal, sys, time
from remoted_client import *
from remoted_client import remote, context, CpuLiveServerless, CpuLiveLoadBalancer, Job
queue = CpuLiveServerless(name="queue", workersMax=2)
def token(path):
    fd = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.write(fd, (context.running_call().attempt + " " + context.running_call().id + "\\n").encode())
    os.close(fd)
"""


def lines_of(path: Path) -> list[list[str]]:
    return [line.split() for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []


def workers_of(host: Host) -> list[psutil.Process]:
    """Without the fork server, whose program is the same."""
    found = [child for child in daemon_process(host).children() if "worker-" in " ".join(child.cmdline())]
    return [child for child in found if not child.environ()["REMOTED_WORKER_ID"].startswith("fork-server")]


def bury(processes: list[psutil.Process]) -> None:
    for process in processes:
        process.kill()
    psutil.wait_procs(processes, timeout=10)


@pytest.mark.parametrize("with_workers", [False, True], ids=["daemon", "daemon-and-workers"])
def test_c09_a_thousand_acknowledged_jobs_each_end_once_after_a_crash(daemon: Host, with_workers: bool) -> None:
    marks = daemon.project / "tokens"
    script = daemon.write(
        "submit.py",
        HEAD
        + f"""
@remote(queue)
def once(n):
    token({str(marks)!r})
    time.sleep(0.002)
    return n
ids = []
for n in range(1000):
    ids.append(once.options(detach=True, max_retries=n % 2)(n))
for n, h in enumerate(ids):
    print(h.id, n % 2, flush=True)
""",
    )
    process = daemon.popen(script)
    wait_until(lambda: len(lines_of(marks)) > 60, 30, daemon.log)
    workers = workers_of(daemon)
    daemon.kill()
    if with_workers:
        bury(workers)
    daemon.start()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    retries = {job: int(number) for job, number in (line.split() for line in out.splitlines())}
    assert len(retries) == 1000
    found = daemon.run(
        HEAD
        + """
ids = json.load(open(sys.argv[1]))
print(json.dumps([[o.id, o.status, o.state_reason, o.attempts] for o in (h.result(timeout=60) for h in [Job.from_id(i) for i in ids])]))
""",
        str(_as_file(daemon, list(retries))),
        timeout=90,
    ).json
    statuses = Counter((status, reason) for _, status, reason, _ in found)
    assert len(found) == 1000
    assert all(status in ("COMPLETED", "FAILED") for _, status, _, _ in found), statuses
    assert all(reason == "LOST" and not retries[job] for job, status, reason, _ in found if status == "FAILED"), statuses
    # What had begun and was not committed: of calls that take a moment up to what one worker is given ahead (decision 0030).
    assert statuses[("FAILED", "LOST")] <= Limits().ahead_calls
    lines = lines_of(marks)
    assert len({attempt for attempt, _ in lines}) == len(lines), "no attempt token ran twice"
    runs = Counter(job for _, job in lines)
    assert all(runs[job] <= 1 + retries[job] for job in retries)
    assert set(runs) <= set(retries)
    for job, status, _, attempts in found:
        assert status == "FAILED" or runs[job] >= 1
        assert runs[job] <= attempts
    daemon.stop()
    with sqlite3.connect(daemon.state / "remoted" / "remoted.sqlite3") as db:
        assert db.execute("SELECT count(*), count(ended_at) FROM jobs").fetchone() == (1000, 1000)
        assert db.execute("SELECT count(*) FROM attempts JOIN jobs ON seq = job WHERE attempts.ended_at IS NULL AND jobs.ended_at IS NULL").fetchone() == (0,)
        assert db.execute("SELECT count(*) FROM attempts WHERE ended_at IS NULL GROUP BY job HAVING count(*) > 1").fetchall() == []
    db.close()
    assert not [path for path in (daemon.state / "remoted" / "outcomes").glob("*.out*") if path.stat().st_size], "nothing is left behind"


def _as_file(host: Host, value: object) -> Path:
    path = host.project / "ids.json"
    path.write_text(json.dumps(value), encoding="utf-8")
    return path


def test_c09_a_client_that_waits_gets_its_result_from_the_next_daemon(daemon: Host) -> None:
    """Running, queued and not awaited yet: the client notices nothing but the time."""
    marks, gate = daemon.project / "tokens", daemon.project / "gate"
    process = daemon.popen(
        HEAD
        + f"""
one = CpuLiveServerless(name="one", workersMax=1)
@remote(one, max_retries=0)
def f(n):
    token({str(marks)!r})
    print("begun", n)
    while not os.path.exists({str(gate)!r}): time.sleep(0.01)
    print("ended", n)
    return n
handles = [f(n) for n in range(5)]
print(json.dumps([[o.status, o.output, o.attempts, o.stdout] for o in (h.result() for h in handles)]))
"""
    )
    wait_until(lambda: len(lines_of(marks)) == 1, 20, daemon.log)
    daemon.kill()
    daemon.start()
    gate.touch()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err + daemon.log()
    assert json.loads(out.splitlines()[-1]) == [["COMPLETED", n, 1, f"begun {n}\nended {n}\n"] for n in range(5)]
    assert len(lines_of(marks)) == 5


NOTED = """
import shutil, sqlite3
state = os.path.dirname(os.environ["REMOTED_SOCKET"]) + "/state/remoted/"
def pid_of_daemon():
    return int(open(state + "lock").read().split()[0])
def is_stored(job):
    "Is it in the database that a dead daemon has left?"
    copy = os.path.abspath("copy%d.sqlite3" % os.getpid())
    for end in ("", "-wal"): shutil.copy(state + "remoted.sqlite3" + end, copy + end)
    db = sqlite3.connect(copy)
    try: return db.execute("SELECT count(*) FROM jobs WHERE id = ?", (job,)).fetchone() == (1,)
    finally: db.close()
"""


@pytest.mark.parametrize("with_worker", [False, True], ids=["daemon", "daemon-and-worker"])
def test_c09_a_job_that_began_before_it_was_stored_outlives_its_daemon(daemon: Host, with_worker: bool) -> None:
    """Its body kills the daemon at once, and its client starts the next and sends it again: it has run, once (docs/decisions/0099)."""
    marks, rounds = daemon.project / "tokens", 2
    result = daemon.run(
        HEAD
        + NOTED
        + f"""
@remote(queue, max_retries=0)
def f(n, pid):
    if not pid: return
    os.kill(pid, signal.SIGKILL)
    with open({str(marks)!r}, "a") as file: file.write(f"{{n}} {{is_stored(context.running_call().id)}}\\n")
    if {with_worker}: os.kill(os.getpid(), signal.SIGKILL)
    return n
for n in range({rounds}):
    f(n, 0).result()
    job = f(n, pid_of_daemon()).result()
    print(json.dumps([job.status, job.state_reason, job.output, job.attempts]))
"""
    )
    end_daemon(daemon)
    ends = [["FAILED", "LOST", None, 1] if with_worker else ["COMPLETED", "", n, 1] for n in range(rounds)]
    assert [json.loads(line) for line in result.out.splitlines()] == ends
    runs = lines_of(marks)
    assert [int(n) for n, _ in runs] == list(range(rounds))
    assert "False" in {stored for _, stored in runs}, "no body was faster than the store"


def test_c09_a_function_that_is_new_to_the_daemon_outlives_it_with_the_job(daemon: Host) -> None:
    """Its code is on its way to the store when it begins, and the client sends both again."""
    result = daemon.run(
        HEAD
        + NOTED
        + """
from importlib import import_module
@remote(queue, max_retries=1)
def warm(): pass
for n in range(2):
    warm().result()
    with open("new%d.py" % n, "w") as file: file.write("import os\\ndef f(pid):\\n    os.kill(pid, 9)\\n    return %d\\n" % n)
    job = remote(queue, max_retries=1)(import_module("new%d" % n).f)(pid_of_daemon()).result()
    print(json.dumps([job.status, job.error, job.output]))
"""
    )
    end_daemon(daemon)
    assert [json.loads(line) for line in result.out.splitlines()] == [["COMPLETED", None, n] for n in range(2)]


def _orphan(daemon: Host, body: str) -> str:
    """The id of a job whose body goes on, and ends, when its daemon has been killed."""
    marks, gate = daemon.project / "tokens", daemon.project / "gate"
    job = daemon.run(
        HEAD
        + f"""
@remote(queue, max_retries=0)
def f():
    print("before", flush=True)
    token({str(marks)!r})
    while not os.path.exists({str(gate)!r}): time.sleep(0.01)
    {body}
print(f.options(detach=True)().id)
"""
    ).out.strip()
    wait_until(lambda: len(lines_of(marks)) == 1, 20, daemon.log)
    workers = workers_of(daemon)
    daemon.kill()
    gate.touch()
    _, alive = psutil.wait_procs(workers, timeout=30)
    assert not alive, "a worker without a daemon ends after its body"
    return job


def test_c09_a_body_that_prints_without_a_daemon_is_not_disturbed_and_its_output_is_found(daemon: Host) -> None:
    """More than a pipe holds: neither a full nor a broken pipe may reach the body."""
    job = _orphan(daemon, 'for n in range(20_000): print("line", n)\n    print("to stderr", file=sys.stderr)\n    return os.urandom(300_000)')
    result = daemon.start().run(
        HEAD
        + f"""
out = Job.from_id({job!r}).result()
print(json.dumps([out.status, out.error, len(out.output), out.stdout == "before\\n" + "".join(f"line {{n}}\\n" for n in range(20_000)), out.stderr]))
"""
    )
    assert result.json == ["COMPLETED", None, 300_000, True, "to stderr\n"]
    assert not list((daemon.state / "remoted" / "outcomes").glob("*.out*"))


def test_c09_what_was_printed_without_a_daemon_is_given_once_by_however_many_are_killed_over_it(daemon: Host) -> None:
    job = _orphan(daemon, 'for n in range(100_000): print("line", n, "x" * 100)')
    for _ in range(5):
        daemon.start().kill()
    text = daemon.start().run(HEAD + f"sys.stdout.write(Job.from_id({job!r}).result().stdout)").out
    assert text == "before\n" + "".join(f"line {n} {'x' * 100}\n" for n in range(100_000))


def test_c09_an_outcome_larger_than_the_database_takes_is_found(daemon: Host) -> None:
    job = _orphan(daemon, "return bytes(1_200_000_000)")
    result = daemon.start().run(HEAD + f"print(len(Job.from_id({job!r}).result().unwrap()))", timeout=60)
    assert result.out.strip() == "1200000000"


def test_c09_a_running_body_that_was_killed_with_the_daemon_is_lost_and_counts(daemon: Host) -> None:
    marks, gate = daemon.project / "tokens", daemon.project / "gate"
    ids = daemon.run(
        HEAD
        + f"""
@remote(queue)
def f(n):
    token({str(marks)!r})
    while not os.path.exists({str(gate)!r}): time.sleep(0.01)
    return n
print(json.dumps([f.options(detach=True, max_retries=n)(n).id for n in range(2)]))
"""
    ).json
    wait_until(lambda: len(lines_of(marks)) == 2, 20, daemon.log)
    workers = workers_of(daemon)
    daemon.kill()
    bury(workers)
    gate.touch()
    result = daemon.start().run(
        HEAD + f"print(json.dumps([[o.status, o.state_reason, o.attempts] for o in (Job.from_id(i).result() for i in {ids})]))"
    )
    assert result.json == [["FAILED", "LOST", 1], ["COMPLETED", result.json[1][1], 2]]
    assert len(lines_of(marks)) == 3


@pytest.mark.parametrize("how", ["cancel", "timeout"])
def test_c09_a_body_that_outlived_its_daemon_can_still_be_stopped(daemon: Host, how: str) -> None:
    marks = daemon.project / "tokens"
    job = daemon.run(
        HEAD
        + f"""
@remote(queue, max_retries=0, timeout={5 if how == "timeout" else 600})
def f():
    token({str(marks)!r})
    time.sleep(600)
print(f.options(detach=True)().id)
"""
    ).out.strip()
    wait_until(lambda: len(lines_of(marks)) == 1, 20, daemon.log)
    workers = workers_of(daemon)
    daemon.kill()
    result = daemon.start().run(
        HEAD
        + f"""
h = Job.from_id({job!r})
before = h.status()
{"h.cancel()" if how == "cancel" else ""}
out = h.result()
print(json.dumps([before, out.status, out.state_reason, out.attempts]))
"""
    )
    expected = ["CANCELLED", "CANCELLED"] if how == "cancel" else ["TIMED_OUT", "TIMEOUT"]
    assert result.json == ["IN_PROGRESS", *expected, 1]
    _, alive = psutil.wait_procs(workers, timeout=10)
    assert not alive


def test_f25_a_caller_that_died_while_the_daemon_was_down_is_noticed(daemon: Host) -> None:
    marks = daemon.project / "tokens"
    process = daemon.popen(
        HEAD
        + f"""
one = CpuLiveServerless(name="one", workersMax=1)
@remote(one, max_retries=0)
def f(n):
    token({str(marks)!r})
    time.sleep(600)
handles = [f(n) for n in range(3)]
print(json.dumps([h.id for h in handles]), flush=True)
handles[0].result()
"""
    )
    assert process.stdout is not None
    ids = json.loads(process.stdout.readline())
    wait_until(lambda: len(lines_of(marks)) == 1, 20, daemon.log)
    daemon.kill()
    process.kill()
    process.communicate()
    result = daemon.start().run(HEAD + f"print(json.dumps([[o.status, o.state_reason] for o in (Job.from_id(i).result() for i in {ids})]))")
    assert result.json == [["CANCELLED", "CALLER_GONE"]] * 3
    assert len(lines_of(marks)) == 1


def test_f06_direct_calls_are_never_sent_twice(daemon: Host) -> None:
    marks, gate = daemon.project / "tokens", daemon.project / "gate"
    process = daemon.popen(
        HEAD
        + f"""
direct = CpuLiveLoadBalancer(name="direct", workersMax=1)
@remote(direct)
def f(n):
    token({str(marks)!r})
    if n == 0: time.sleep(600)
    return n
@remote(direct)
def g(n): return n
handles = [f(n) for n in range(3)]
found = []
for h in handles:
    try: found.append(h.result())
    except WorkerLost as error: found.append(error.reason)
while not os.path.exists({str(gate)!r}): time.sleep(0.01)
print(json.dumps([found, g(5).result()]))
"""
    )
    wait_until(lambda: len(lines_of(marks)) == 1, 20, daemon.log)
    workers = workers_of(daemon)
    daemon.kill()
    bury(workers)
    daemon.start()
    gate.touch()
    out, err = process.communicate(timeout=60)
    assert process.returncode == 0, err + daemon.log()
    assert json.loads(out) == [["WORKER_DIED", 1, 2], 5], "the one that had begun is lost; nothing of the others had been sent"
    assert len(lines_of(marks)) == 3


@pytest.mark.parametrize("reads", [True, False])
def test_f21_a_stream_that_lost_its_daemon_is_never_called_complete(daemon: Host, reads: bool) -> None:
    """Half of its items are gone with the daemon: the worker ends, and the job says LOST."""
    process = daemon.popen(
        HEAD
        + f"""
@remote(queue, max_retries=0)
def f():
    n = 0
    while True:
        yield n
        n += 1
        if {reads}: time.sleep(0.01)
h = f()
items = iter(h)
seen = [next(items) for _ in range(5)]
print(h.id, flush=True)
if not {reads}: time.sleep(3)
try:
    for seen in items: pass
except Exception as error: print(type(error).__name__)
"""
    )
    assert process.stdout is not None
    job = process.stdout.readline().strip()
    workers = workers_of(daemon)
    time.sleep(0.5)  # nothing tells from outside that the body waits for its reader
    daemon.kill()
    assert not psutil.wait_procs(workers, timeout=20)[1], "the worker waits for a reader that cannot come"
    out, err = process.communicate(timeout=60)  # it has started the next daemon
    found = daemon.run(HEAD + f"o = Job.from_id({job!r}).result()\nprint(json.dumps([o.status, o.state_reason]))")
    assert found.json == ["FAILED", "LOST"], out + err
    end_daemon(daemon)


def test_c09_crashes_one_after_another_lose_nothing(daemon: Host) -> None:
    """Recovery is idempotent: a daemon killed while it recovers has changed nothing that matters (T49)."""
    marks = daemon.project / "tokens"
    ids = daemon.run(
        HEAD
        + f"""
@remote(queue)
def f(n):
    token({str(marks)!r})
    time.sleep(0.01)
    return n
print(json.dumps([h.id for h in [f.options(detach=True, max_retries=0)(n) for n in range(300)]]))
"""
    ).json
    for goal in (20, 40, 60, 80):
        wait_until(lambda goal=goal: len(lines_of(marks)) >= goal, 30, daemon.log)
        daemon.kill()
        daemon.start()
    result = daemon.run(
        HEAD + f"print(json.dumps([[o.status, o.output, o.state_reason] for o in (h.result() for h in [Job.from_id(i) for i in {ids}])]))"
    )
    lost = [n for n, (status, _, _) in enumerate(result.json) if status != "COMPLETED"]
    assert len(lost) <= 4 * 2, "at most what two workers had in hand at four crashes"
    assert all(result.json[n] == ["FAILED", None, "LOST"] for n in lost)
    assert all(result.json[n][:2] == ["COMPLETED", n] for n in range(300) if n not in lost)
    lines = lines_of(marks)
    assert len({job for _, job in lines}) == len(lines), "no body ran twice"
    assert len(lines) >= 300 - len(lost)
    daemon.stop()
    assert not list((daemon.state / "remoted" / "outcomes").glob("*.out*"))
    assert not [path for path in (daemon.state / "remoted" / "secrets").rglob("*") if path.is_file()], "no environment outlives its calls"


def test_c09_an_orderly_stop_ends_nobody_who_runs_a_call(daemon: Host) -> None:
    """SIGTERM in mid-job: the waiting client starts the next daemon, which takes the job over; queued ones stay queued."""
    marks, gate = daemon.project / "tokens", daemon.project / "gate"
    process = daemon.popen(
        HEAD
        + f"""
one = CpuLiveServerless(name="one", workersMax=1)
@remote(one)
def f(n):
    token({str(marks)!r})
    print("begun", n)
    while not os.path.exists({str(gate)!r}): time.sleep(0.01)
    print("ended", n)
    return n
@remote(queue)
def quick(): return os.getpid()
quick().result()
handles = [f(n) for n in range(3)]
print(json.dumps([[o.status, o.output, o.attempts, o.stdout] for o in (h.result() for h in handles)]))
"""
    )
    wait_until(lambda: len(lines_of(marks)) == 1, 20, daemon.log)
    workers = workers_of(daemon)
    assert len(workers) == 2
    began = time.monotonic()
    daemon.terminate()
    assert time.monotonic() - began < 5
    assert sum(worker.is_running() for worker in workers) == 1, "the idle worker ended, the busy one did not"
    gate.touch()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err + daemon.log()
    assert json.loads(out.splitlines()[-1]) == [["COMPLETED", n, 1, f"begun {n}\nended {n}\n"] for n in range(3)]
    assert len(lines_of(marks)) == 3
    assert "started your own daemon" in err
    end_daemon(daemon)


def end_daemon(host: Host) -> None:
    """The one that a script has started."""
    pid = int((host.state / "remoted" / "lock").read_text().split()[0])
    process = psutil.Process(pid)
    process.send_signal(signal.SIGQUIT)
    process.wait(15)


def test_c09_stop_now_ends_running_jobs_and_says_so(daemon: Host) -> None:
    marks = daemon.project / "tokens"
    running, queued = daemon.run(
        HEAD
        + f"""
one = CpuLiveServerless(name="one", workersMax=1)
@remote(one)
def f(n):
    token({str(marks)!r})
    while n == 0: time.sleep(0.01)
    return n
print(json.dumps([f.options(detach=True)(n).id for n in range(2)]))
"""
    ).json
    wait_until(lambda: len(lines_of(marks)) == 1, 20, daemon.log)
    said = daemon.run(HEAD + "import subprocess; subprocess.run([sys.executable, '-c', 'from remoted.cli import main; main()', 'stop', '--now'], check=True)").out
    assert "1 running job ended with it" in said
    result = daemon.start().run(
        HEAD + f"print(json.dumps([[o.status, o.state_reason, o.error, o.attempts] for o in (Job.from_id(i).result() for i in {[running, queued]})]))"
    )
    stopped = "stopped: the daemon was told to end at once, running jobs included"
    assert result.json == [["CANCELLED", "DAEMON_STOPPED", stopped, 1], ["COMPLETED", "", None, 1]]


def test_c09_a_job_that_ended_without_a_daemon_ran_until_then_and_no_longer(daemon: Host) -> None:
    go = daemon.project / "go"
    job = daemon.run(
        HEAD
        + f"""
@remote(queue, max_retries=0)
def wait():
    print("begun", flush=True)
    while not os.path.exists({str(go)!r}): time.sleep(0.01)
    return time.time()
job = wait.options(detach=True)()
while not job.logs(): time.sleep(0.01)
print(json.dumps(job.id))
"""
    ).json
    workers = workers_of(daemon)
    daemon.kill()
    go.touch()
    psutil.wait_procs(workers, timeout=20)
    absent = time.time()

    returned = daemon.start().run(HEAD + f"print(json.dumps(Job.from_id({job!r}).result().unwrap()))").json
    daemon.stop()
    (file,) = daemon.state.rglob("remoted.sqlite3")
    with contextlib.closing(sqlite3.connect(file)) as database:
        [(started, ran)] = database.execute("SELECT started_at, run_seconds FROM jobs WHERE id = ?", (job,)).fetchall()

    assert returned <= started + ran <= absent
