"""T49: the daemon is killed again and again at moments that nobody chose, while a client submits. REMOTED_TEST_KILLS says how often."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import threading

import pytest

from tests.faults.test_daemon_deaths import end_daemon
from tests.harness import Host, wait_until
from tests.root.vm_load import SCRIPT, Verdict, compare, report, told

pytestmark = [pytest.mark.root, pytest.mark.timeout(7200)]

KILLS = int(os.environ.get("REMOTED_TEST_KILLS", "10"))


def _listen(client: subprocess.Popen[str], said: list[str]) -> None:
    assert client.stdout is not None
    for line in client.stdout:
        said.append(line.rstrip("\n"))  # noqa: PERF401 - one by one, as they come


def test_t49_kills_at_any_moment_lose_nothing_and_repeat_nothing(daemon: Host) -> None:
    """The client starts the next daemon."""
    script, asked = daemon.write("load.py", SCRIPT), daemon.folder / "asked"
    chance = random.Random(49)
    client = daemon.popen(script, "submit", str(25 * KILLS))
    said: list[str] = []
    listener = threading.Thread(target=_listen, args=(client, said))
    listener.start()
    for _ in range(KILLS):
        goal = len(said) + chance.randrange(1, 30)
        wait_until(lambda goal=goal: len(said) >= goal or client.poll() is not None, 60, daemon.log)
        assert client.poll() is None, "the load was over too soon"
        os.kill(int((daemon.state / "remoted/lock").read_text().split()[0]), signal.SIGKILL)
    listener.join(300)
    _, err = client.communicate(timeout=60)
    assert client.returncode == 0, err
    jobs, outcomes = told(said)
    asked.write_text("\n".join(jobs), encoding="ascii")
    found = told(daemon.run(script, "check", str(asked), timeout=600).out.splitlines())[1]
    verdict = Verdict()
    compare(verdict, jobs, outcomes, found, (daemon.home / "tokens").read_text(encoding="ascii"))
    report(verdict)
    end_daemon(daemon)

    assert verdict.is_good, verdict
