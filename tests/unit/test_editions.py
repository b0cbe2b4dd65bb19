"""What an upgrade finds and what it leaves: the schema in a database's head, programs of workers that still run."""

from __future__ import annotations

import asyncio
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from remoted.cli.editions import Edition, remove_unused
from remoted.cli.ending import CliError
from remoted.spawn import runtime
from remoted.store import SCHEMA_VERSION, Store


def test_t52_an_edition_that_does_not_know_a_database_is_refused_while_a_daemon_has_it_open(tmp_path: Path) -> None:
    async def look() -> None:
        store = Store(tmp_path / "db")
        await store.open()
        try:
            Edition(tmp_path, "2.0", SCHEMA_VERSION).require_knows(tmp_path / "db")
            with pytest.raises(CliError, match=rf"schema {SCHEMA_VERSION}, this one knows {SCHEMA_VERSION - 1}"):
                Edition(tmp_path, "1.0", SCHEMA_VERSION - 1).require_knows(tmp_path / "db")
        finally:
            await store.close()

    asyncio.run(look())


def test_a_host_without_a_database_takes_any_edition(tmp_path: Path) -> None:
    Edition(tmp_path, "1.0", 1).require_knows(tmp_path / "db")


def test_a_program_that_a_process_runs_stays_and_others_go(tmp_path: Path) -> None:
    current = runtime.build(tmp_path)
    running, old = tmp_path / "worker-0123.pyz", tmp_path / "worker-4567.pyz"
    for path in (running, old):
        path.write_text("print('up', flush=True); input()", encoding="ascii")
    process = subprocess.Popen([sys.executable, str(running)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "up\n"
        runtime.sweep(tmp_path, current)
        assert sorted(tmp_path.iterdir()) == sorted([current, running])
    finally:
        process.communicate("\n")
    runtime.sweep(tmp_path, current)

    assert list(tmp_path.iterdir()) == [current]


def test_what_an_interrupted_installation_left_goes_and_nothing_that_is_used_or_somebody_elses(tmp_path: Path) -> None:
    """Named by the link, by the unit; being made; of somebody who liked the name; half made; hardly begun."""
    names = ("remoted-linked00", "remoted-in_unit0", "remoted-making00", "remoted-theirs00", "remoted-backups", "remoted-half0000", "remoted-begun000")
    linked, in_unit, making, theirs, backups, half, begun = folders = [tmp_path / name for name in names]
    for folder in folders:
        folder.mkdir()
    for folder in (linked, in_unit, making, backups, half):
        (folder / "pyvenv.cfg").touch()
    (theirs / "notes").touch()
    (tmp_path / "remoted").symlink_to(linked)
    (tmp_path / "remoted.service").write_text(f"[Service]\nExecStart={in_unit}/bin/python -I -m remoted --system\n", encoding="utf-8")
    lock = os.open(making, os.O_RDONLY)
    fcntl.flock(lock, fcntl.LOCK_EX)

    assert sorted(remove_unused(tmp_path / "remoted", tmp_path)) == [begun, half]
    assert all(folder.exists() for folder in (linked, in_unit, making, theirs, backups))
    os.close(lock)
    assert list(remove_unused(tmp_path / "remoted", tmp_path)) == [making]
