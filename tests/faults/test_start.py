"""Starting and finding a daemon in user mode (C02, T52; MECHANISMS 7)."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.harness import Host, host, wait_until
from tests.old_schemas import make_old

HEAD = """
import json, os, sys
from remoted_client import *
from remoted_client import remote, CpuLiveServerless, Job
queue = CpuLiveServerless(name="queue")
@remote(queue)
def f(x): return [x, os.getppid()]
"""


@pytest.fixture
def lonely() -> Iterator[Host]:
    """A host whose daemons are started by first calls; they end when they have been idle for some seconds."""
    with host() as made:
        config = made.folder / "xdg" / "remoted" / "config.toml"
        config.parent.mkdir(parents=True)
        config.write_text("[limits]\nuser_mode_idle_seconds = 4\n", encoding="utf-8")
        try:
            yield made
        finally:
            for process in daemons_of(made):
                process.kill()
            psutil.wait_procs(daemons_of(made), timeout=5)


def daemons_of(host: Host) -> list[psutil.Process]:
    found = []
    for process in psutil.process_iter():
        try:
            if "--user" in process.cmdline() and process.environ().get("XDG_STATE_HOME") == str(host.state):
                found.append(process)
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
    return found


def start_and_fail(host: Host) -> str:
    """Start a daemon that must refuse; gives what it says."""
    done = subprocess.run(
        [sys.executable, "-m", "remoted", "--user", "--config", str(host.config)],
        env={**host.environ, "PYTHONWARNINGS": "default"},
        cwd="/",
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    lines = done.stderr.strip().splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("remoted: cannot ")
    return lines[0]


def test_c02_two_first_calls_at_once_start_one_daemon(lonely: Host) -> None:
    script = lonely.write("first.py", HEAD + "print(json.dumps(f(1).result(timeout=40).unwrap()))")
    processes = [lonely.popen(script) for _ in range(4)]
    answers = [process.communicate(timeout=60) for process in processes]
    assert [process.returncode for process in processes] == [0] * 4, answers
    assert len({out for out, _ in answers}) == 1, "one daemon served all"
    lines = [line for _, err in answers for line in err.splitlines()]
    assert len(lines) == 1, lines
    assert "started your own daemon" in lines[0]
    wait_until(lambda: len(daemons_of(lonely)) == 1, 20)  # the others find the lock taken, say so and end


def test_c02_an_idle_daemon_ends_and_the_next_call_starts_another(lonely: Host) -> None:
    first = lonely.run(HEAD + "print(json.dumps(f(1).result().unwrap()))")
    wait_until(lambda: not daemons_of(lonely), 20)
    second = lonely.run(HEAD + "print(json.dumps(f(1).result().unwrap()))")
    assert first.json[1] != second.json[1]
    assert "started your own daemon" in second.err


def test_c02_a_call_after_the_sockets_were_deleted_gets_a_new_daemon(lonely: Host) -> None:
    first = lonely.run(HEAD + "print(json.dumps(f(1).result().unwrap()))")
    for path in lonely.sockets.iterdir():
        path.unlink()
    second = lonely.run(HEAD + "print(json.dumps(f(1).result().unwrap()))")
    assert first.json[1] != second.json[1]
    wait_until(lambda: len(daemons_of(lonely)) == 1, 10)


def test_c02_leftovers_of_a_killed_daemon_are_in_nobodys_way(daemon: Host) -> None:
    """A stale lock, stale sockets, a stale write-ahead log."""
    daemon.run(HEAD + "f(1).result()")
    daemon.kill()
    assert (daemon.sockets / "data.sock").exists()
    assert (daemon.state / "remoted" / "lock").exists()
    daemon.start().run(HEAD + "f(1).result().unwrap()")


def test_c02_a_second_daemon_says_that_there_is_one(daemon: Host) -> None:
    assert "another daemon of yours" in start_and_fail(daemon)
    daemon.run(HEAD + "f(1).result().unwrap()")


def database(host: Host) -> Path:
    return host.state / "remoted" / "remoted.sqlite3"


def test_t52_a_newer_database_is_refused_and_left_alone(daemon: Host) -> None:
    daemon.stop()
    with sqlite3.connect(database(daemon)) as db:
        db.execute("PRAGMA user_version = 99")
    db.close()
    before = database(daemon).read_bytes()
    sentence = start_and_fail(daemon)
    assert "newer remoted" in sentence
    assert "99" in sentence
    assert database(daemon).read_bytes() == before


def test_t52_a_database_of_the_first_schema_is_copied_and_then_changed(daemon: Host) -> None:
    job = daemon.run(HEAD + "o = f(1).result(); o.unwrap(); print(o.id)").out.strip()
    daemon.stop()
    make_old(database(daemon), 1)
    daemon.start().run(HEAD + f"Job.from_id({job!r}).result().unwrap(); f(1).result().unwrap()")
    copy = database(daemon).with_name("remoted.sqlite3.schema-1")
    assert copy.stat().st_mode & 0o777 == 0o600
    with sqlite3.connect(copy) as db:
        assert db.execute("SELECT id FROM jobs").fetchall() == [(job,)]
    db.close()


def test_t54_a_job_that_cannot_be_taken_over_fails_and_the_others_go_on(daemon: Host) -> None:
    """Whatever stands in its row."""
    gate = daemon.project / "gate"
    script = (
        HEAD
        + f"""
import time
@remote(CpuLiveServerless(name="one", workersMax=1))
def slow(n):
    while not os.path.exists({str(gate)!r}): time.sleep(0.01)
    return n
print(json.dumps([slow.options(detach=True)(n).id for n in range(3)]))
"""
    )
    ids = daemon.run(script).json
    daemon.kill()
    with sqlite3.connect(database(daemon)) as db:
        db.execute("UPDATE jobs SET options = ? WHERE id = ?", ('{"identity": 5}', ids[2]))
    db.close()
    daemon.start()
    gate.touch()
    found = daemon.run(HEAD + f"print(json.dumps([[o.status, o.output, o.error] for o in (Job.from_id(i).result(timeout=30) for i in {ids!r})]))").json
    assert [each[:2] for each in found] == [["COMPLETED", 0], ["COMPLETED", 1], ["FAILED", None]]
    assert "cannot take it over after a restart" in found[2][2]


def test_t52_jobs_that_wait_and_run_outlive_a_change_of_the_schema(daemon: Host) -> None:
    marks, gate = daemon.project / "marks", daemon.project / "gate"
    script = (
        HEAD
        + f"""
import time
@remote(CpuLiveServerless(name="one", workersMax=1), max_retries=0)
def slow(n):
    with open({str(marks)!r}, "a") as file: file.write(f"{{n}}\\n")
    while not os.path.exists({str(gate)!r}): time.sleep(0.01)
    return n
@remote(queue)
def gen(): yield from range(3)
assert (found := list(gen())) == [0, 1, 2], found
print(json.dumps([slow.options(detach=True)(n).id for n in range(3)]))
"""
    )
    ids = daemon.run(script).json
    wait_until(marks.exists, 20, daemon.log)
    daemon.kill()
    make_old(database(daemon), 2)
    daemon.start()
    gate.touch()
    found = daemon.run(HEAD + f"print(json.dumps([[o.status, o.output, o.attempts] for o in (Job.from_id(i).result(timeout=30) for i in {ids!r})]))").json
    assert found == [["COMPLETED", n, 1] for n in range(3)]
    assert sorted(marks.read_text(encoding="utf-8").split()) == ["0", "1", "2"]


@pytest.mark.parametrize("damage", ["header", "pages", "noise", "cut"])
def test_t52_a_damaged_database_is_refused_with_a_sentence_and_left_alone(daemon: Host, damage: str) -> None:
    daemon.run(HEAD + "for out in f.map(range(50)): out.unwrap()")
    daemon.stop()
    path = database(daemon)
    data = bytearray(path.read_bytes())
    if damage == "header":
        data[:16] = b"not a database!!"
    elif damage == "pages":
        for start in range(4096, len(data), 4096):
            data[start : start + 200] = os.urandom(200)
    elif damage == "noise":
        data = bytearray(os.urandom(len(data)))
    else:
        del data[len(data) // 2 :]
    path.write_bytes(data)
    sentence = start_and_fail(daemon)
    assert str(path) in sentence
    assert path.read_bytes() == bytes(data)


def test_t52_the_caller_hears_at_once_why_its_daemon_does_not_start(lonely: Host) -> None:
    path = database(lonely)
    path.parent.mkdir(parents=True, mode=0o700)
    path.write_bytes(os.urandom(8192))
    result = lonely.run(
        HEAD
        + """
import time
begun = time.monotonic()
try: f(1).result()
except DaemonUnreachable as error: print(json.dumps([str(error), time.monotonic() - begun]))
"""
    )
    message, seconds = result.json
    assert "remoted.sqlite3" in message
    assert seconds < 10


def test_a_state_folder_that_somebody_else_may_read_is_closed(bare_host: Host) -> None:
    folder = bare_host.state / "remoted"
    folder.mkdir(mode=0o777)
    folder.chmod(0o777)
    bare_host.start()
    assert folder.stat().st_mode & 0o777 == 0o700


def test_a_state_folder_that_is_a_link_is_refused(bare_host: Host) -> None:
    elsewhere = bare_host.folder / "elsewhere"
    elsewhere.mkdir()
    (bare_host.state / "remoted").symlink_to(elsewhere)
    assert "cannot use" in start_and_fail(bare_host)


def test_unknown_limits_and_broken_configuration_are_refused_with_a_sentence(bare_host: Host) -> None:
    for text, part in [
        ("[limits]\nworker_total = 3\n", "worker_total"),
        ("[limits\n", "config.toml"),
        ("[gpus]\n", "gpus"),
        ("[limits]\nworkers_total = -1\n", "negative"),
    ]:
        bare_host.config.write_text(text, encoding="utf-8")
        assert part in start_and_fail(bare_host)


def test_c09_a_worker_that_was_starting_when_the_daemon_was_stopped_is_nobodys_failure(daemon: Host) -> None:
    python = daemon.write("python", f"""\
        #!/bin/sh
        [ -e {daemon.project}/open ] && exec {sys.executable} "$@"
        echo $$ >{daemon.project}/begun.new; mv {daemon.project}/begun.new {daemon.project}/begun
        mkfifo {daemon.project}/never && read line <{daemon.project}/never
        """)  # fmt: skip
    python.chmod(0o755)
    job = daemon.run(HEAD + f"sys.executable = {str(python)!r}\nprint(json.dumps(f.options(detach=True, max_retries=0)(1).id))").json
    wait_until((daemon.project / "begun").exists, 20)

    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGSTOP)
    daemon.process.terminate()
    os.kill(int((daemon.project / "begun").read_text(encoding="ascii")), signal.SIGTERM)
    daemon.process.send_signal(signal.SIGCONT)  # it finds both at once, as at the end of a session
    daemon.process.wait(15)
    (daemon.project / "open").touch()
    done = daemon.start().run(HEAD + f"out = Job.from_id({job!r}).result()\nprint(json.dumps([out.status, out.error, out.attempts]))").json

    assert done == ["COMPLETED", None, 1]
