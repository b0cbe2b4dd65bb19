"""Commands that wait stay over a restart of the daemon, and go on where they were (F31)."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys

import pytest

from tests.fakes.service_manager import ServiceManager
from tests.harness import Host, wait_until
from tests.integration.test_c04_remotectl import MAIN, Terminal

BOTH = pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM], ids=["killed", "restarted"])
#: Counts until it is told that it is enough, on both streams.
COUNTING = """
import os, sys, time
n = 0
while n < 200 or not os.path.exists(sys.argv[1]):
    print("out", n, flush=True)
    print("err", n, file=sys.stderr, flush=True)
    n += 1
    time.sleep(0.002)
"""
IMPATIENT = f"import remoted.cli.absence as absence; absence._PATIENCE_SECONDS = 0.5\n{MAIN}"


def counting(host: Host) -> tuple[Terminal, str]:
    terminal = Terminal(host)
    return terminal, terminal.job(sys.executable, str(host.write("counting.py", COUNTING)), str(host.project / "enough"))


class Command:
    """One that is looked at while it goes on."""

    def __init__(self, terminal: Terminal, *arguments: str, program: str = MAIN) -> None:
        self._said = [terminal.folder / f"{id(self)}.{name}" for name in ("out", "err")]
        out, err = (path.open("wb") for path in self._said)
        with out, err:
            self.process = subprocess.Popen([sys.executable, "-c", program, *arguments], env=terminal.environ, stdin=subprocess.DEVNULL, stdout=out, stderr=err)

    @property
    def out(self) -> str:
        return self._said[0].read_text(encoding="utf-8")

    @property
    def err(self) -> str:
        return self._said[1].read_text(encoding="utf-8")

    def says_anything(self) -> None:
        wait_until(lambda: self.out or self.err, 30)

    def says_more(self) -> None:
        before = len(self.out) + len(self.err)
        wait_until(lambda: len(self.out) + len(self.err) > before, 30)

    def ends(self) -> int:
        return self.process.wait(60)


def ends_counting(host: Host) -> None:
    (host.project / "enough").touch()


def is_counted(text: str, word: str) -> bool:
    lines = text.splitlines()
    return len(lines) >= 200 and lines == [f"{word} {n}" for n in range(len(lines))]


@BOTH
def test_c04_logs_goes_on_over_restarts_and_no_line_is_missing_or_told_twice(manager: ServiceManager, how: signal.Signals) -> None:
    terminal, job = counting(manager.host)
    command = Command(terminal, "logs", "-f", job)
    for _ in range(2):
        command.says_more()
        manager.restart(how)
    command.says_more()
    ends_counting(manager.host)

    assert command.ends() == 0, command.err
    assert is_counted(command.out, "out")
    assert is_counted(command.err, "err")


def test_c04_logs_of_one_stream_goes_on_as_well(manager: ServiceManager) -> None:
    terminal, job = counting(manager.host)
    command = Command(terminal, "logs", "-f", "--stderr", job)
    command.says_more()
    manager.restart(signal.SIGKILL)
    ends_counting(manager.host)

    assert (command.ends(), command.out) == (0, "")
    assert is_counted(command.err, "err")


@BOTH
def test_c04_run_goes_on_over_a_restart(manager: ServiceManager, how: signal.Signals) -> None:
    program = manager.host.write("counting.py", COUNTING)
    command = Command(Terminal(manager.host), "run", "--", sys.executable, str(program), str(manager.host.project / "enough"))
    command.says_more()
    manager.restart(how)
    ends_counting(manager.host)

    assert command.ends() == 0, command.err
    assert is_counted(command.out, "out")
    assert is_counted(command.err, "err")


@BOTH
def test_c04_wait_goes_on_over_a_restart(manager: ServiceManager, how: signal.Signals) -> None:
    terminal, job = counting(manager.host)
    process = terminal.start("wait", job)
    manager.restart(how)
    ends_counting(manager.host)
    out, err = process.communicate(timeout=60)

    assert (process.returncode, err) == (0, b"")
    assert b"COMPLETED" in out


def test_c04_who_waits_at_a_terminal_is_told_once_that_the_daemon_went_away(daemon: Host) -> None:
    terminal, job = counting(daemon)
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", MAIN, "wait", job], env=terminal.environ, stdin=theirs, stdout=theirs, stderr=theirs)
    os.close(theirs)
    said = b""

    def hear(words: bytes) -> None:
        nonlocal said
        while words not in said:
            try:
                said += os.read(ours, 65536)
            except OSError:
                raise AssertionError(said.decode()) from None

    hear(b"IN_PROGRESS")
    daemon.kill()
    hear(b"the daemon went away; waiting until it is back ...")
    daemon.start()
    ends_counting(daemon)
    hear(b"COMPLETED")

    assert process.wait(60) == 0
    assert said.count(b"the daemon went away") == 1
    os.close(ours)


def test_c04_a_daemon_that_does_not_come_back_ends_a_command_that_waits_by_name(daemon: Host) -> None:
    terminal, job = counting(daemon)
    commands = [Command(terminal, *words, program=IMPATIENT) for words in (("logs", "-f", job), ("status", "--watch"))]
    for command in commands:
        command.says_anything()
    commands.append(Command(terminal, "drain", "--wait", program=IMPATIENT))  # only now: nothing begins any more
    wait_until(lambda: terminal.json("status")["daemon"]["drain"], 30)
    daemon.kill()
    for command in commands:
        assert command.ends() == 3
        assert "remotectl: the daemon went away and did not come back within " in command.err
        assert "no daemon answers at" in command.err
    ends_counting(daemon)
    daemon.start()


@pytest.mark.parametrize("words", [["status"], ["ps"], ["logs", "-f", "0"]], ids=" ".join)
def test_c04_a_daemon_that_takes_connections_and_says_nothing_is_told_without_a_terminal_too(bare_host: Host, words: list[str]) -> None:
    manager = ServiceManager(bare_host)
    process = Terminal(bare_host).start(*words)
    assert process.stderr is not None
    told = process.stderr.readline().decode()
    process.kill()
    process.communicate()
    manager.close()

    assert told == "remotectl: the daemon has not answered yet, waiting ...\n"


def test_c04_the_silence_that_a_command_asks_for_is_not_told(daemon: Host) -> None:
    terminal, job = counting(daemon)
    code, out, err = terminal("wait", "--timeout", "4", job)
    ends_counting(daemon)

    assert (code, out) == (1, "")
    assert "waiting" not in err
    assert "it goes on" in err


def test_c04_ctrl_c_ends_a_command_that_waits_for_a_daemon(daemon: Host) -> None:
    terminal, job = counting(daemon)
    command = Command(terminal, "logs", "-f", job)
    command.says_more()
    daemon.kill()
    command.process.send_signal(signal.SIGINT)

    assert command.ends() == 130
    ends_counting(daemon)
    daemon.start()
