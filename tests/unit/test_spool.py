"""What a worker leaves for the next daemon is its user's word, down to the last byte."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from remoted.spool import Spool
from remoted_client import wire

WORKER = "wabc-1"
TOKEN = "t" * 32


def record(head: bytes, payload: bytes = b"") -> bytes:
    return len(head).to_bytes(4, "big") + head + payload + wire.OUTCOME_MARK


@pytest.mark.parametrize(
    "left",
    [
        record(b"[" * 60_000),
        record(b'{"a":' * 10_000),
        record(b"[]"),
        record(b"null"),
        record(b"{}"),
        record(b'{"payload_size": 1e999}'),
        record(b'{"payload_size": NaN}'),
        record(b'{"payload_size": ' + b"9" * 5000 + b"}"),
        record(b'{"payload_size": ' + b"9" * 4000 + b"}"),
        record(b'{"payload_size": true, "attempt": []}', b"x"),
        record(b'{"payload_size": -1}'),
        record(b'{"payload_size": 0, "kind": 1, "attempt": "' + TOKEN.encode() + b'"}'),
        record(b'{"payload_size": 0, "attempt": "\xff"}'),
        b"\xff" * 100,
        bytes(100_000),
    ],
    ids=range(15),
)
def test_t34_whatever_a_worker_has_left_keeps_no_daemon_from_its_start(tmp_path: Path, left: bytes) -> None:
    spool = Spool(tmp_path)
    for fd in spool.open(WORKER):
        os.write(fd, left)
        os.close(fd)
    spool.holds(WORKER, TOKEN)
    assert spool.outcome(WORKER, TOKEN, None) is None
    assert spool.output(WORKER, 0)[0] == []


def test_t34_what_stands_before_nonsense_counts(tmp_path: Path) -> None:
    spool = Spool(tmp_path)
    outcomes, output = spool.open(WORKER)
    os.write(outcomes, record(b'{"payload_size": 2, "attempt": "' + TOKEN.encode() + b'"}', b"ok") + record(b"[" * 60_000))
    os.close(outcomes)
    os.close(output)
    found = spool.outcome(WORKER, TOKEN, None)
    assert found is not None
    assert (found.kind, found.payload) == ("returned", b"ok")
