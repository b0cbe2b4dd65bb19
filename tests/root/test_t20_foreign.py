"""T20: descriptors of files that hang whoever looks at them or closes them: the sender's own file system does not answer."""

from __future__ import annotations

import contextlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.faults.test_daemon_deaths import HEAD
from tests.harness import ROOT, Host, host, wait_until

pytestmark = [pytest.mark.root, pytest.mark.timeout(120)]
_SERVER = Path(__file__).with_name("silent_files.py")

#: It hangs in its own end: whoever has such a file closes it.
SEND = """
import os, socket, sys
sys.path.insert(0, {root!r})
from remoted_client import wire
fd = os.open({file!r}, os.O_RDWR)
for _ in range(int(sys.argv[2])):
    sock = socket.socket(socket.AF_UNIX)
    sock.settimeout(20)
    sock.connect(sys.argv[1])
    wire.send(sock, wire.encode({{"op": "hello", "protocol": wire.PROTOCOL, "started": 0}}))
    said = sock.recv(65536)
    if b"welcome" in said:
        wire.send(sock, wire.encode({{"op": "put", "digest": "0" * 64, "role": "arguments"}}, b"", 1), (fd,))
        said = sock.recv(65536)
    print("BAD_FDS" if b"BAD_FDS" in said else said, flush=True)
"""
#: Of a daemon that is stopped: all of it lies unread when it goes on.
UNREAD = """
import os, signal, socket, sys
sys.path.insert(0, {root!r})
from remoted_client import wire
daemon = int(sys.argv[3])
os.kill(daemon, signal.SIGSTOP)
fd = os.open({file!r}, os.O_RDWR)
for _ in range(int(sys.argv[2])):
    sock = socket.socket(socket.AF_UNIX)
    sock.connect(sys.argv[1])
    wire.send(sock, wire.encode({{"op": "hello", "protocol": wire.PROTOCOL, "started": 0}}, b"", 1), (fd,))
    sock.close()
os.kill(daemon, signal.SIGCONT)
print("sent", flush=True)
"""
CALL = HEAD + """
@remote(CpuLiveServerless(name="bystander", workersMax=1))
def f(): return 7
print(f().result(timeout=20).output)
"""
#: From inside a body: its worker's own channel.
WORKER = HEAD + """
@remote(CpuLiveServerless(name="hostile", workersMax=1), max_retries=0)
def f(path, file):
    import socket, stat
    from remoted_client import wire
    fd = os.open(file, os.O_RDWR)
    for number in map(int, os.listdir("/proc/self/fd")):
        with __import__("contextlib").suppress(OSError):
            sock = socket.socket(fileno=os.dup(number))
            if sock.type == socket.SOCK_SEQPACKET:
                wire.send(sock, wire.encode({"op": "item", "attempt": context.running_call().attempt, "number": 0}, b"", 1), (fd,))
                open(path, "w").close()
    time.sleep(60)
print(f.options(detach=True)(*sys.argv[1:]).id, flush=True)
"""


@pytest.fixture
def silent(tmp_path: Path) -> Iterator[Path]:
    """The file. When its server ends the kernel lets go whoever waits for it."""
    point = tmp_path / "point"
    point.mkdir()
    server = subprocess.Popen([sys.executable, str(_SERVER), str(point)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert server.stdout is not None
    try:
        assert server.stdout.readline() == "ready\n"
        yield point / "file"
    finally:
        server.kill()
        server.wait()
        server.stdout.close()
        subprocess.run(["umount", "-l", str(point)], check=False, capture_output=True)


@pytest.fixture
def connections() -> Iterator[None]:
    """Where root can end the FUSE of anybody; systemd mounts it on a usual host."""
    is_ours = not any(Path("/sys/fs/fuse/connections").iterdir())
    if is_ours:
        subprocess.run(["mount", "-t", "fusectl", "fusectl", "/sys/fs/fuse/connections"], check=True)
    yield
    if is_ours:
        subprocess.run(["umount", "/sys/fs/fuse/connections"], check=True)


@contextlib.contextmanager
def _sender(place: Host, silent: Path, count: int) -> Iterator[subprocess.Popen[str]]:
    script = SEND.format(root=str(ROOT / "client"), file=str(silent))
    sender = subprocess.Popen([sys.executable, "-c", script, str(place.sockets / "data.sock"), str(count)], stdout=subprocess.PIPE, text=True)
    assert sender.stdout is not None
    with sender.stdout:
        yield sender
    sender.wait(20)


def test_t20_a_file_that_cannot_be_closed_is_refused_and_nobody_else_waits(silent: Path) -> None:
    with host() as place:
        place.start()
        with _sender(place, silent, 3) as sender:
            assert sender.stdout
            assert [sender.stdout.readline() for _ in range(3)] == ["BAD_FDS\n"] * 3
            assert place.run(CALL, timeout=40).out == "7\n"
            _let_go(silent)
        assert place.run(CALL, timeout=40).out == "7\n"


def test_t20_who_passes_files_that_cannot_be_closed_has_the_fewer_connections(silent: Path) -> None:
    with host("[limits]\nconnections_per_uid = 4\n") as place:
        place.start()
        with _sender(place, silent, 5) as sender:
            assert sender.stdout
            said = [sender.stdout.readline() for _ in range(5)]
            assert said[:4] == ["BAD_FDS\n"] * 4
            assert "connections_per_uid is 4" in said[4]
            _let_go(silent)
        wait_until(lambda: place.run(CALL, timeout=40, check=False).out == "7\n", 20, place.log)


def test_t20_a_worker_that_passes_such_a_file_ends_and_nobody_else_waits(silent: Path) -> None:
    with host() as place:
        place.start()
        sent = place.project / "sent"
        job = place.run(WORKER, str(sent), str(silent)).out.strip()
        wait_until(sent.exists, 20, place.log)
        assert place.run(CALL, timeout=40).out == "7\n"
        _let_go(silent)  # the worker itself could not end before
        found = place.run(HEAD + "out = Job.from_id(sys.argv[1]).result(timeout=30)\nprint(json.dumps([out.status, out.state_reason]))", job, timeout=60).json
        assert found == ["FAILED", "WORKER_DIED"]


@pytest.mark.usefixtures("connections")
def test_t20_a_file_system_that_keeps_the_daemon_from_its_end_is_ended(silent: Path) -> None:
    with host() as place:
        place.start()
        with _sender(place, silent, 3) as sender:
            assert sender.stdout
            assert [sender.stdout.readline() for _ in range(3)] == ["BAD_FDS\n"] * 3
            place.terminate()
        assert "that file system was ended" in place.log()
        assert place.start().run(CALL, timeout=40).out == "7\n"


@pytest.mark.usefixtures("connections")
def test_t20_what_lies_unread_in_a_connection_keeps_nobody_waiting(silent: Path) -> None:
    """One of the connections is turned away at the door, before anything of it is read."""
    with host("[limits]\nconnections_per_uid = 2\n") as place:
        place.start()
        assert place.process is not None
        script = UNREAD.format(root=str(ROOT / "client"), file=str(silent))
        command = [sys.executable, "-c", script, str(place.sockets / "data.sock"), "3", str(place.process.pid)]
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as sender:
            assert sender.stdout is not None
            assert sender.stdout.readline() == "sent\n"
            wait_until(lambda: place.run(CALL, timeout=40, check=False).out == "7\n", 20, place.log)
            place.terminate()
        assert place.log().count("that file system was ended") >= 1


def _let_go(silent: Path) -> None:
    """Before the daemon is ended: it could not end."""
    found = subprocess.run(["pgrep", "-f", f"silent_files.py {silent.parent}"], capture_output=True, text=True, check=True)
    for pid in found.stdout.split():
        subprocess.run(["kill", "-9", pid], check=True)
