"""C04: what ``remotectl doctor`` says of a daemon that runs: its configuration, its database, its disk, what users must reach."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import pytest

from remoted.cli.checks import shut_out
from remoted.limits import size_text
from remoted.trust import closed_to_others
from tests.harness import Host, wait_until

PATIENCE_SECONDS = 60.0


def checks(host: Host) -> dict[str, Any]:
    command = [sys.executable, "-c", "from remoted.cli import main; main()", "doctor", "--json"]
    done = subprocess.run(command, env=host.environ, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    return {check["name"]: check for check in json.loads(done.stdout)["checks"]}


def test_c04_doctor_always_has_a_line_about_the_configuration(daemon: Host) -> None:
    found = checks(daemon)["configuration"]

    assert (found["ok"], found["warning"], found["detail"]) == (True, False, f"{daemon.config}: in force")


def test_c04_doctor_says_that_a_reload_was_refused_and_that_the_next_start_would_fail(daemon: Host) -> None:
    daemon.config.write_text("[limits]\nspeed = 1\nworkers_totals = 3\n", encoding="utf-8")
    assert daemon.process is not None
    daemon.process.send_signal(signal.SIGHUP)
    wait_until(lambda: "was not reloaded" in daemon.log(), PATIENCE_SECONDS)

    found = checks(daemon)["configuration"]

    assert not found["ok"]
    assert "limits.speed: this limit does not exist" in found["detail"]
    assert "(and 1 more); what was read before stays in force" in found["detail"]
    assert "the next start will fail" in found["advice"]


def test_c04_doctor_says_what_nobody_has_reloaded_and_what_waits_for_a_start(daemon: Host) -> None:
    daemon.config.write_text("[limits]\nstream_items = 7\n", encoding="utf-8")
    found = checks(daemon)["configuration"]
    assert (found["ok"], found["warning"], "limits.stream_items" in found["detail"]) == (True, True, True)
    assert found["advice"].startswith("run: kill -HUP ")

    daemon.config.write_text("cpus = 1\n", encoding="utf-8")
    found = checks(daemon)["configuration"]
    assert (found["ok"], found["warning"], found["detail"]) == (True, True, "changes at the next start only: cpus")


@pytest.mark.parametrize("suffix", ["", "-wal"])
def test_t52_doctor_sees_that_the_database_was_removed_under_the_daemon(daemon: Host, suffix: str) -> None:
    assert checks(daemon)["database"]["ok"]
    next(daemon.state.rglob(f"remoted.sqlite3{suffix}")).unlink()

    found = checks(daemon)["database"]

    assert not found["ok"]
    assert "was removed or replaced" in found["detail"]
    assert "lost at its next start" in found["detail"]


def test_c04_doctor_counts_a_small_disk_in_megabytes(daemon: Host) -> None:
    assert [size_text(count) for count in (922, 67_108_864, 99_000_000, 5_300_000_000)] == ["922 bytes", "67 MB", "99 MB", "5.3 GB"]
    assert f"the disk that holds {daemon.state / 'remoted'}; 67 MB of it stay reserved" in checks(daemon)["disk"]["detail"]


def test_c04_what_is_closed_to_users_is_found_on_the_way_and_behind_links() -> None:
    with tempfile.TemporaryDirectory(dir="/tmp") as made:
        folder = Path(made)
        folder.chmod(0o755)
        for name in ("opt", "usr"):
            (folder / name).mkdir()
        program, link = folder / "usr" / "python", folder / "opt" / "python"
        program.touch(mode=0o755)
        link.symlink_to(program)

        assert closed_to_others([link]) is None
        for part in (folder / "opt", folder / "usr", program):
            part.chmod(0o700)
            assert closed_to_others([link]) == part
            part.chmod(0o755)


def test_c04_doctor_says_that_users_are_shut_out_of_the_systems_sockets(tmp_path: Path) -> None:
    """Root is let in whatever the modes are, and would find that all is well."""
    tmp_path.chmod(0o755)
    for name in ("data.sock", "api.sock"):
        (tmp_path / name).touch()
        (tmp_path / name).chmod(0o666)
    assert not shut_out(tmp_path)

    (tmp_path / "data.sock").chmod(0o600)
    assert shut_out(tmp_path) == f"{tmp_path / 'data.sock'} has the mode 0600"
    tmp_path.chmod(0o700)
    assert shut_out(tmp_path) == f"{tmp_path} has the mode 0700"
