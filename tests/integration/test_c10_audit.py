"""C10: one line for each call that ended, in the journal or in the log, that nobody can forge and nobody need fear."""

from __future__ import annotations

import asyncio
import contextlib
import re
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from remoted.audit import MESSAGE_ID, Audit, fields_of, plain
from remoted.endings import Ending
from remoted.journal import Journal
from remoted.model import Status
from tests.harness import host

ENDING = Ending("queue", "ab" * 16, 1000, "train", "pool", Status.COMPLETED, "", 1, 0.25, 1.5, ("GPU-1", "GPU-2"), "w1", 42)


@pytest.fixture
def journald(tmp_path: Path) -> Iterator[socket.socket]:
    """A socket that takes datagrams as systemd's does."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "socket"))
        sock.settimeout(10)
        yield sock


def entry(data: bytes) -> dict[str, str]:
    return dict(line.split("=", 1) for line in data.decode().splitlines())


async def test_c10_an_entry_of_the_journal_has_a_field_for_everything(journald: socket.socket) -> None:
    with contextlib.closing(Journal(Path(journald.getsockname()))) as journal:
        Audit(journal, names=True).note(ENDING)

    assert entry(journald.recv(65536)) == {
        "MESSAGE": f"job {ENDING.id} of uid 1000 COMPLETED: waited 0.2 s, ran 1.5 s",
        "MESSAGE_ID": MESSAGE_ID,
        "PRIORITY": "6",
        "SYSLOG_IDENTIFIER": "remoted",
        "REMOTED_JOB_ID": ENDING.id,
        "REMOTED_KIND": "queue",
        "REMOTED_UID": "1000",
        "REMOTED_NAME": "train",
        "REMOTED_POOL": "pool",
        "REMOTED_STATUS": "COMPLETED",
        "REMOTED_REASON": "",
        "REMOTED_ATTEMPTS": "1",
        "REMOTED_QUEUE_SECONDS": "0.250",
        "REMOTED_RUN_SECONDS": "1.500",
        "REMOTED_GPUS": "GPU-1 GPU-2",
        "REMOTED_WORKER": "w1",
        "REMOTED_RESULT_BYTES": "42",
    }


@pytest.mark.parametrize("name", ["a\nREMOTED_UID=0", "\x1b[2J\x07", "right\u202eleft", "x" * 10_000, '" uid=0 name="', "\ud800", "back\\slash\n"])
async def test_t19_a_name_cannot_forge_a_field_or_steer_a_terminal(journald: socket.socket, name: str) -> None:
    ending = Ending("queue", "ab" * 16, 1000, name, name, Status.FAILED, "EXCEPTION", 1, 0.0, 0.0, (), "w1", 0)

    with contextlib.closing(Journal(Path(journald.getsockname()))) as journal:
        Audit(journal, names=True).note(ending)

    data = journald.recv(65536)
    found = entry(data)
    assert len(data) < 8192
    assert found["REMOTED_UID"] == "1000"
    assert found["PRIORITY"] == "5"
    assert data.decode().replace("\n", "").isprintable()
    assert not re.search(r'(?<!\\)"', found["REMOTED_NAME"]), "it would end the quoted name of a log line"


async def test_c10_without_names_nothing_that_a_user_wrote_is_there() -> None:
    assert "train" not in str(fields_of(ENDING, names=False))
    assert "pool" not in fields_of(ENDING, names=False).values()


async def test_c10_a_journal_that_does_not_read_costs_no_waiting_and_no_entry_is_out_of_order(journald: socket.socket) -> None:
    journal = Journal(Path(journald.getsockname()))

    for number in range(2000):
        journal.send({"NUMBER": str(number)})

    loop, found = asyncio.get_running_loop(), []
    journald.setblocking(False)
    while len(found) < 2000:
        found.append(entry(await loop.sock_recv(journald, 65536))["NUMBER"])
    assert found == [str(number) for number in range(2000)]
    assert journal.lost == 0
    journal.close()


async def test_c10_a_journal_that_is_gone_loses_entries_and_nothing_else(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "socket")
    journal.send({"A": "1"})
    assert journal.lost == 1

    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "socket"))
        journal.send({"A": "2"})
        assert entry(sock.recv(65536)) == {"A": "2"}
    journal.close()


async def test_c10_what_would_be_more_than_one_line_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="several lines"):
        Journal(tmp_path / "socket").send({"A": "b\nC=d"})


def test_c10_plain_leaves_readable_text_alone() -> None:
    assert plain("Übung 3 (größer)") == "Übung 3 (größer)"


SCRIPT = """
from remoted_client import remote, CpuLiveServerless
@remote(CpuLiveServerless(name="pool"))
def f(x): return x
f.options(name="evil\\x1b[31m\\nname").__call__("swordfish-3141").result()
"""


def test_c10_a_log_line_for_each_job_where_there_is_no_journal() -> None:
    with host("[audit]\nenabled = true\n") as made:
        made.start().run(SCRIPT)
        (line,) = [line for line in made.log().splitlines() if "remoted.audit" in line]

    assert re.search(r'ended job_id=[0-9a-f]{32} kind=queue uid=\d+ name="evil\\x1b\[31m\\nname" pool="pool" status=COMPLETED reason= attempts=1 ', line)
    assert "swordfish" not in line


def test_c10_a_users_own_daemon_writes_no_audit_unless_it_is_told_to() -> None:
    with host() as made:
        made.start().run(SCRIPT)
        assert "remoted.audit" not in made.log()
