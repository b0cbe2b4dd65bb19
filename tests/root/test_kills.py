"""T49: the daemon is killed again and again at moments that nobody chose, while a client submits. REMOTED_TEST_KILLS says how often."""

from __future__ import annotations

import os
import random
import signal
import threading
from typing import IO

import pytest

from tests.faults.test_daemon_deaths import end_daemon
from tests.harness import Host, wait_until
from tests.root.vm_load import SCRIPT, Verdict, compare, report, told

pytestmark = [pytest.mark.root, pytest.mark.timeout(7200)]

KILLS = int(os.environ.get("REMOTED_TEST_KILLS", "10"))


def _listen(stream: IO[str] | None, said: list[str]) -> threading.Thread:
    """Both streams are read all along: it says of each daemon that it starts one, and nine hundred such lines fill a pipe."""

    def listen() -> None:
        assert stream is not None
        with stream:
            for line in stream:
                said.append(line.rstrip("\n"))  # noqa: PERF401 - one by one, as they come

    listener = threading.Thread(target=listen)
    listener.start()
    return listener


def test_t49_kills_at_any_moment_lose_nothing_and_repeat_nothing(daemon: Host) -> None:
    """The client starts the next daemon."""
    script, asked = daemon.write("load.py", SCRIPT), daemon.folder / "asked"
    chance = random.Random(49)
    client = daemon.popen(script, "submit", str(25 * KILLS))
    said: list[str] = []
    errors: list[str] = []
    listeners = [_listen(client.stdout, said), _listen(client.stderr, errors)]
    for _ in range(KILLS):
        goal = len(said) + chance.randrange(1, 30)
        wait_until(lambda goal=goal: len(said) >= goal or client.poll() is not None, 60, daemon.log)
        assert client.poll() is None, "the load was over too soon"
        os.kill(int((daemon.state / "remoted/lock").read_text().split()[0]), signal.SIGKILL)
    for listener in listeners:
        listener.join(300)
    assert client.wait(60) == 0, errors[-20:]
    jobs, outcomes = told(said)
    asked.write_text("\n".join(jobs), encoding="ascii")
    found = told(daemon.run(script, "check", str(asked), timeout=600).out.splitlines())[1]
    verdict = Verdict()
    compare(verdict, jobs, outcomes, found, (daemon.home / "tokens").read_text(encoding="ascii"))
    report(verdict)
    end_daemon(daemon)

    assert verdict.is_good, verdict
