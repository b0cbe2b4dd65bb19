"""First attempts that left before their jobs were stored: what the next daemon finds of them (docs/decisions/0099)."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import struct
import zlib
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any

import pytest

from remoted.redo import RedoLog
from remoted.store import SCHEMA_VERSION, Store

BOOT = "0f2f6c1c-8a5b-4e6e-9d5b-1f5b5f3f9a10"
Row = tuple[Any, ...]


def rows_of(seq: int, arguments: bytes = b"\x80\x05)}\x94\x86\x94.") -> tuple[Row, Row]:
    """A job and its first attempt, as the docket writes them."""
    job = (seq, f"{seq:032x}", 1000, "f", "m:f", "demo", "IN_QUEUE", "s" * 64, "c" * 64, "", "x" * 64, "", arguments, '{"name":"\u00e4"}', "", "[1, 2]", 1795722575.924530)
    return job, (seq, 1, f"{seq:032x}", "w1-1", 4242, 17.25, BOOT, "", 1, 1795722575.925)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "redo"


def in_store(folder: Path, work: Callable[[Store], Coroutine[Any, Any, Any]]) -> Any:
    async def run() -> Any:
        store = Store(folder / "remoted.sqlite3")
        await store.open()
        try:
            return await work(store)
        finally:
            await store.close()

    return asyncio.run(run())


def stored(folder: Path) -> list[tuple[int, bytes, str]]:
    with sqlite3.connect(folder / "remoted.sqlite3") as db:
        found = db.execute("SELECT seq, arguments_inline, token FROM jobs JOIN attempts ON job = seq ORDER BY seq").fetchall()
    db.close()
    return found


def noting(path: Path, *rows: tuple[Row, Row], boot: str = BOOT) -> RedoLog:
    """Of a daemon that is killed next."""
    redo = RedoLog(path, boot)
    redo.open()
    assert all(redo.note(*each) for each in rows)
    return redo


def replayed(path: Path, boot: str = BOOT) -> RedoLog:
    redo = RedoLog(path, boot)
    in_store(path.parent, lambda store: store.submit(redo.replay))  # type: ignore[arg-type, return-value]
    return redo


def test_c09_what_was_noted_and_not_stored_is_stored_by_the_next_daemon(path: Path) -> None:
    noting(path, rows_of(7), rows_of(8, bytes(range(256)) * 100)).close()
    assert replayed(path).last_seq == 8
    assert stored(path.parent) == [(7, rows_of(7)[0][12], f"{7:032x}"), (8, bytes(range(256)) * 100, f"{8:032x}")]


def test_c09_what_is_stored_is_not_stored_again(path: Path) -> None:
    noting(path, rows_of(7)).close()
    replayed(path)
    assert replayed(path).last_seq == 0
    assert len(stored(path.parent)) == 1


def test_t49_a_note_of_another_boot_says_nothing(path: Path) -> None:
    noting(path, rows_of(7), boot="another").close()
    replayed(path)
    assert stored(path.parent) == []


@pytest.mark.parametrize("cut", [1, 20, 200])
def test_t52_half_a_note_is_none_and_those_before_it_count(path: Path, cut: int) -> None:
    noting(path, rows_of(7), rows_of(8)).close()
    path.write_bytes(path.read_bytes()[:-cut])
    replayed(path)
    assert [seq for seq, _, _ in stored(path.parent)] == [7]


def test_t52_a_note_that_was_changed_is_none(path: Path) -> None:
    noting(path, rows_of(7)).close()
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    replayed(path)
    assert stored(path.parent) == []


@pytest.mark.parametrize("generation", [1, 2, 3])
def test_t49_what_users_wrote_into_older_notes_is_no_note(path: Path, generation: int) -> None:
    """Behind a short note lie the arguments of a longer one, and they look like a note of root's."""
    job, attempt = rows_of(4242)
    rows = json.dumps((SCHEMA_VERSION, BOOT, [*job[:2], 0, *job[3:12], *job[13:]], attempt)).encode()
    forged = struct.pack("=QIII", generation, len(rows), 0, zlib.crc32(rows)) + rows
    size = _size_of(path, rows_of(8))

    async def go_on() -> None:
        redo = noting(path, rows_of(7, bytes(size - _size_of(path.with_name("other"), rows_of(7, b""))) + forged))
        redo.settle()
        assert redo.note(*rows_of(8))

    asyncio.run(go_on())
    assert path.read_bytes()[size:].startswith(forged)
    replayed(path)
    assert [seq for seq, _, _ in stored(path.parent)] == [8]


def _size_of(path: Path, rows: tuple[Row, Row]) -> int:
    noting(path, rows).close()
    return path.stat().st_size


def test_c09_notes_of_what_is_stored_are_written_over_and_do_not_count(path: Path) -> None:
    async def go_on() -> None:
        redo = noting(path, rows_of(7), rows_of(8))
        redo.settle()
        redo.settle()
        assert redo.note(*rows_of(9))

    asyncio.run(go_on())
    replayed(path)
    assert [seq for seq, _, _ in stored(path.parent)] == [9]


def test_c09_an_orderly_end_leaves_no_notes(path: Path) -> None:
    async def end() -> None:
        redo = noting(path, rows_of(7))
        redo.settle()
        redo.close()

    asyncio.run(end())
    replayed(path)
    assert stored(path.parent) == []


def test_c09_the_next_daemon_begins_with_an_empty_file(path: Path) -> None:
    noting(path, rows_of(7)).close()
    redo = replayed(path)
    redo.open()
    redo.close()
    assert path.read_bytes() == b""


def test_c09_what_the_store_could_never_take_is_not_noted(path: Path) -> None:
    job, attempt = rows_of(7)
    redo = noting(path)
    assert not redo.note((*job[:3], "\udce4", *job[4:]), attempt)
    redo.close()


def test_c09_a_note_that_cannot_be_stored_keeps_no_daemon_from_its_start(path: Path) -> None:
    job, attempt = rows_of(7)
    noting(path, (job, (99, *attempt[1:])), rows_of(8)).close()
    assert replayed(path).last_seq == 8
    assert [seq for seq, _, _ in stored(path.parent)] == [8]


def test_t44_who_finds_no_room_waits_for_the_store(path: Path) -> None:
    redo = noting(path)
    assert not all(redo.note(*rows_of(number, bytes(60_000))) for number in range(1, 30))
    redo.close()
    full = RedoLog(Path("/dev/full"), BOOT)
    full.open()
    assert not full.note(*rows_of(1))
    full.close()
    assert not full.note(*rows_of(1))
