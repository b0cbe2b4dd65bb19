"""The system's daemon is installed and cannot be reached: everybody says that, and nobody goes past it with a daemon of their own (decision 0091)."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import cast

import pytest

from remoted_client import DaemonUnreachable, connection
from remoted_client.daemon import SYSTEM_UNIT
from tests.fakes.service_manager import ServiceManager
from tests.harness import Host, wait_until
from tests.integration.test_c04_remotectl import PATIENCE_SECONDS

needs_root = pytest.mark.skipif(os.geteuid() != 0, reason="NEEDS ROOT: another user")
AWAY = "the system's daemon is installed here and does not run, or its sockets are gone; an administrator mends that with `systemctl restart remoted.socket remoted`"
CALL = """
from remoted_client import CpuLiveServerless, DaemonUnreachable, remote
@remote(CpuLiveServerless(name="queue"))
def f(): return 5
try: print(f().result().unwrap())
except DaemonUnreachable as error: print(error)
"""
#: Of whom the interpreter may be out of reach: everything is imported before.
STRANGER = """
import encodings.ascii, encodings.latin_1, os
import remoted.cli.checks, remoted.cli.overview, remoted.cli.look, remoted.cli.system, remoted_client.submission, remoted_client.lease_pool
os.setgid(60001)
os.setuid(60001)
"""


class Machine:
    """One whose /run/remoted and unit lie in the host's folder."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.unit = host.folder / "remoted.socket"
        for folder in (host.folder.parent, host.folder):
            folder.chmod(0o755)
        self._head = f"""
import remoted_client, remoted_client.daemon, remoted_client.connection, remoted.cli.transport
for module in (remoted_client.daemon, remoted_client.connection, remoted.cli.transport):
    module.SYSTEM_DIRECTORY, module.SYSTEM_UNIT = {os.fspath(host.sockets)!r}, {os.fspath(self.unit)!r}
remoted_client.daemon._RESTART_SECONDS = 0.1
"""

    def install(self) -> None:
        self.unit.touch()

    def script(self, beginning: str = "") -> str:
        return self.host.run(self._head + beginning + CALL, REMOTED_SOCKET="").out.strip()

    def remotectl(self, *arguments: str, beginning: str = "") -> tuple[int, str]:
        """(exit code, what it said)"""
        program = f"{self._head}{beginning}from remoted.cli import main; main()"
        environ = {**self.host.environ, "REMOTED_SOCKET": ""}
        done = subprocess.run([sys.executable, "-c", program, *arguments], env=environ, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False, cwd="/")
        return done.returncode, done.stdout + done.stderr


@pytest.fixture
def machine(bare_host: Host) -> Machine:
    return Machine(bare_host)


def test_the_unit_is_where_install_enables_it() -> None:
    text = (Path(__file__).parents[2] / "systemd/system/remoted.socket").read_text(encoding="utf-8")
    assert f"WantedBy={Path(SYSTEM_UNIT).parent.name.removesuffix('.wants')}\n" in text


def test_c01_where_it_is_installed_and_away_a_script_a_command_and_doctor_say_so(machine: Machine) -> None:
    machine.install()
    said = machine.script()
    assert said.startswith(f"no daemon answers at {machine.host.sockets}/data.sock: {AWAY}; ")
    assert "REMOTED_SOCKET names the folder of a daemon of your own" in said
    assert not (machine.host.state / "remoted").exists()  # no daemon of one's own was started
    assert machine.remotectl("status") == (3, f"remotectl: no daemon answers at {machine.host.sockets}/api.sock: {AWAY}\n")
    code, said = machine.remotectl("doctor", "--json")
    daemon = next(check for check in json.loads(said)["checks"] if check["name"] == "daemon")
    assert (code, daemon["ok"]) == (1, False)
    assert AWAY in daemon["detail"]


def test_c01_where_it_is_not_installed_or_masked_everybody_has_their_own(machine: Machine) -> None:
    code, said = machine.remotectl("status")
    assert code == 3
    assert "it starts with your first call" in said
    machine.unit.symlink_to("/dev/null")
    assert "it starts with your first call" in machine.remotectl("status")[1]
    assert machine.script() == "5"
    pid = int((machine.host.state / "remoted" / "lock").read_text(encoding="ascii").split()[0])
    end = os.pidfd_open(pid)
    signal.pidfd_send_signal(end, signal.SIGQUIT)
    os.close(end)


def test_c01_a_daemon_of_ones_own_that_is_named_is_used_all_the_same(machine: Machine, bare_host: Host) -> None:
    machine.install()
    assert bare_host.start().run(CALL).out.strip() == "5"


@needs_root
@pytest.mark.root
@pytest.mark.parametrize("what", ["folder", "sockets"])
def test_c01_who_may_not_open_it_is_told_so_and_who_can_change_that(machine: Machine, what: str) -> None:
    machine.install()
    machine.host.start()
    machine.host.sockets.chmod(0o700 if what == "folder" else 0o755)
    for said in (machine.script(STRANGER), machine.remotectl("status", beginning=STRANGER)[1], machine.remotectl("doctor", beginning=STRANGER)[1]):
        assert "you may not open it, so it is closed to you or its folder is; an administrator mends that with `systemctl restart remoted.socket remoted`" in said
        assert "REMOTED_SOCKET" not in said


def test_c01_a_restart_makes_sockets_that_were_taken_away(bare_host: Host) -> None:
    bare_host.config.write_text("[limits]\nhousekeeping_seconds = 0.2\n", encoding="utf-8")
    manager = ServiceManager(bare_host)
    manager.start()
    for path in bare_host.sockets.iterdir():
        path.unlink()
    process = bare_host.process
    assert process is not None
    wait_until(lambda: process.poll() is not None, 30)
    assert process.returncode == 1  # so systemd starts it again
    assert "the sockets were taken away" in bare_host.log()
    manager.start()
    assert "was taken away: the daemon makes its own, until `systemctl restart remoted.socket remoted`" in bare_host.log()
    assert bare_host.run(CALL).out.strip() == "5"
    bare_host.stop()
    manager.close()


def test_c09_a_script_under_way_says_once_that_it_waits_for_the_next_daemon(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[str] = []

    def refuse() -> socket.socket:
        raise ConnectionRefusedError

    monkeypatch.setattr(connection, "connect", refuse)
    monkeypatch.setattr(connection, "SILENCE_SECONDS", 0.1)
    monkeypatch.setattr(connection, "socket_directory", lambda: connection.SYSTEM_DIRECTORY)
    monkeypatch.setattr(connection.echo, "show", lambda stream, text: shown.append(text))
    with pytest.raises(DaemonUnreachable, match="did not come back within 60 s"):
        connection.Connection._reconnect(cast("connection.Connection", None), time.monotonic() + 1.0)

    (line,) = shown
    assert line.startswith("remoted: the daemon went away, waiting up to 60 s for the next one ...; ")
