"""What the daemon's log says to the journal: a level that `journalctl -p` finds, on each line, and no second time."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
from pathlib import Path

from remoted.journal import LeveledLines, is_read_from
from tests.harness import Host


def test_a_level_stands_before_each_line() -> None:
    lines = LeveledLines("%(name)s: %(message)s")

    for level, number in ((logging.CRITICAL, 2), (logging.ERROR, 3), (logging.WARNING, 4), (logging.INFO, 6), (logging.DEBUG, 7)):
        record = logging.makeLogRecord({"name": "remoted.app", "levelno": level, "msg": "first\nsecond"})
        assert lines.format(record) == f"<{number}>remoted.app: first\n<{number}>second"


def test_only_the_very_stream_that_the_journal_reads_gets_them(tmp_path: Path) -> None:
    with (tmp_path / "a").open("w") as ours, (tmp_path / "b").open("w") as other:
        status = os.fstat(ours.fileno())
        environ = {"JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}

        assert is_read_from(ours.fileno(), environ)
        assert not is_read_from(other.fileno(), environ)
        assert not is_read_from(ours.fileno(), {})


def test_a_daemon_whose_log_the_journal_reads_writes_levels_and_no_time(bare_host: Host) -> None:
    log = bare_host.folder / "daemon.log"
    log.touch()
    status = log.stat()

    bare_host.start(JOURNAL_STREAM=f"{status.st_dev}:{status.st_ino}")

    assert any(line.startswith("<6>remoted.app: remoted ") for line in bare_host.log().splitlines())


def test_a_daemon_that_cannot_start_says_so_as_an_error(bare_host: Host) -> None:
    bare_host.config.write_text("cpus = 0\n", encoding="utf-8")
    with (bare_host.folder / "said").open("w+") as said:
        status = os.fstat(said.fileno())
        command = [sys.executable, "-m", "remoted", "--user", "--config", str(bare_host.config)]
        subprocess.run(command, env={**bare_host.environ, "JOURNAL_STREAM": f"{status.st_dev}:{status.st_ino}"}, stderr=said, timeout=60, check=False)
        said.seek(0)
        assert said.read().startswith("<3>remoted: cannot use the configuration: ")
