"""A job's log over kills of the daemon, full disks and what a power cut leaves."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from remoted.logs import RECORD_OVERHEAD, STDERR, STDOUT, JobLog, read_records
from remoted.pipes import Unread

CALL = "c" * 32
CAP = 1 << 30


def _log(folder: Path, is_new: bool = True, cap: int = CAP) -> JobLog:
    return JobLog(folder, CALL, cap, is_new)


def _piped(data: bytes) -> Unread:
    read, write = os.pipe()
    os.write(write, data)
    os.close(write)
    return Unread(read, len(data))


def _said(log: JobLog) -> list[tuple[int, bytes]]:
    records, end = read_records(log.path, 0, CAP)
    assert end == log.size
    return records


def test_f22_what_comes_through_a_pipe_is_in_the_log_and_can_be_had_for_those_who_watch(tmp_path: Path) -> None:
    log, first, second = _log(tmp_path), _piped(b"out\n"), _piped(b"err\n")
    log.append(STDOUT, first)
    log.append(STDERR, second)

    assert _said(log) == [(STDOUT, b"out\n"), (STDERR, b"err\n")]
    assert (first.data, second.data) == (b"out\n", b"err\n")


def test_f22_beyond_the_cap_it_is_read_and_counted(tmp_path: Path) -> None:
    log, much = _log(tmp_path, cap=10), _piped(b"more than ten bytes")
    log.append(STDOUT, _piped(b"few"))
    log.append(STDOUT, much)
    log.close()

    kept = _said(log)
    assert kept[0] == (STDOUT, b"few")
    assert b"19 bytes of output were not kept" in kept[-1][1]
    assert much.data == b"more than ten bytes"  # who watches sees it all the same


POUR = """
import os, random, signal, sys, time
from pathlib import Path
from remoted.logs import JobLog
from remoted.pipes import Unread, _waiting_bytes
folder, lines, call = Path(sys.argv[1]), int(sys.argv[2]), "c" * 32
read, write = os.pipe()
if (writer := os.fork()) == 0:
    os.close(read)
    for number in range(lines):
        os.write(write, b"line %d\\n" % number)
    os._exit(0)
os.close(write)
chance, kills, parent = random.Random(22), 0, os.getpid()
while True:
    if (daemon := os.fork()) == 0:
        log = JobLog(folder, call, 1 << 30, not (folder / f"{call}.log").exists())
        while True:
            if size := _waiting_bytes(read):
                log.append(1, Unread(read, min(size, 1 << 16)))
            elif os.getppid() != parent or os.path.exists(folder / "over"):
                os._exit(0)
    time.sleep(chance.random() * (0.004 + kills * 0.0001))  # on a busy machine none would live long enough to take anything
    if os.waitpid(writer, os.WNOHANG) != (0, 0):
        (folder / "over").touch()
        os.waitpid(daemon, 0)
        break
    os.kill(daemon, signal.SIGKILL)
    os.waitpid(daemon, 0)
    kills += 1
print(kills)
"""


def test_c09_a_daemon_that_is_killed_while_it_takes_output_loses_none_and_keeps_none_twice(tmp_path: Path) -> None:
    lines = 300_000
    done = subprocess.run([sys.executable, "-c", POUR, str(tmp_path), str(lines)], capture_output=True, text=True, timeout=120, check=True)

    assert int(done.stdout) > 20
    log = _log(tmp_path, is_new=False)
    assert b"".join(data for _, data in _said(log)) == b"".join(b"line %d\n" % number for number in range(lines))


@pytest.mark.parametrize("torn", [1, RECORD_OVERHEAD, RECORD_OVERHEAD + 1, RECORD_OVERHEAD + 5])
def test_t49_the_last_record_is_as_long_as_what_is_there_of_it(tmp_path: Path, torn: int) -> None:
    log = _log(tmp_path)
    log.append(STDOUT, b"whole\n")
    before = log.size
    log.append(STDERR, b"not whole\n")
    os.truncate(log.path, before + torn)

    found = _log(tmp_path, is_new=False)
    found.append(STDOUT, b"next\n")
    left = b"not whole\n"[: max(0, torn - RECORD_OVERHEAD)]
    assert _said(found) == [(STDOUT, b"whole\n"), *([(STDERR, left)] if left else []), (STDOUT, b"next\n")]


def test_t50_zeros_behind_the_last_record_are_no_output(tmp_path: Path) -> None:
    """A file whose new size was written and whose data were not."""
    log = _log(tmp_path)
    log.append(STDOUT, b"whole\n")
    os.truncate(log.path, log.size + 4096)

    found = _log(tmp_path, is_new=False)
    found.append(STDOUT, b"next\n")
    assert _said(found) == [(STDOUT, b"whole\n"), (STDOUT, b"next\n")]


def test_t44_output_that_finds_no_room_is_counted_and_leaves_no_half_of_a_record(tmp_path: Path) -> None:
    """The limit of a process's files is a disk that is full after so many bytes."""
    log, much = _log(tmp_path), _piped(b"four and more\n")
    log.append(STDOUT, b"whole\n")
    room, most = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (log.size + RECORD_OVERHEAD + 4, most))
    try:
        log.append(STDOUT, much)
        rest = Unread(much.pipe, len(b" and more\n"))
        log.append(STDOUT, rest)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, most))

    assert _said(log) == [(STDOUT, b"whole\n"), (STDOUT, b"four")]
    assert (rest.data, log.dropped) == (b" and more\n", len(b" and more\n"))
