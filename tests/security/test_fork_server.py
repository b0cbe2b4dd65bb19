"""A fork server is its user's process and as hostile as a worker: what it presents is believed only when it is its own grandchild."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import psutil
import pytest

from remoted.spawn.door import Door, NotBelieved
from remoted.spawn.launch import Process
from remoted_client import wire
from tests.harness import Host

#: A module to preload that turns the server into another one: what follows says how it bears.
EVIL = """
import json, os, signal, socket, sys, time
import remoted_worker.forkserver as forkserver
from remoted_client import wire
Server = forkserver.ForkServer
honest_bear, honest_introduction = Server._bear, Server._introduce

def present(door, header):
    "Connect as a worker would, and wait for a word."
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    sock.connect(f"/proc/self/fd/{door}")
    wire.send(sock, wire.encode({"op": "born", **header}))
    return sock

def fresh(self, frame): self._say({"op": "fresh", "token": frame.header["token"]})
"""
NOT_BELIEVED = "the fork server is not believed any more: a process that the fork server has not borne came in the place of a worker"


def call(daemon: Host, name: str, text: str, **environ: str) -> dict[str, Any]:
    """A call in a pool whose fork server has imported ``text``; the call is served, and the worker is returned as it is shown."""
    folder = daemon.folder / "lib" / "site-packages"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(EVIL + text, encoding="utf-8")
    path = os.pathsep.join([daemon.environ["PYTHONPATH"], str(folder)])
    result = daemon.run(
        f"""
import json, os
from remoted_client import remote, CpuLiveServerless
f = remote(CpuLiveServerless(name={name!r}, workersMax=1, preload={name!r}), env={dict(environ)!r})(lambda: (os.getpid(), os.getppid()))
out = f().result()
print(json.dumps([out.status, out.output]))
""",
        PYTHONPATH=path,
    )
    status, (pid, parent) = result.json
    assert daemon.process is not None
    assert (status, parent) == ("COMPLETED", daemon.process.pid)
    code = "import sys; from remoted.cli import main; sys.argv = ['remotectl', 'workers', '--json']; main()"
    document = json.loads(daemon.run(daemon.write("ctl.py", code)).out)
    worker: dict[str, Any] = next(worker for worker in document["workers"] if worker["pool"] == name)
    assert worker["pid"] == pid
    return worker


def test_t34_a_pid_that_a_fork_server_names_is_not_read(shared_daemon: Host) -> None:
    """Another user's process (that of pid 1), named in every message: the worker is who connected."""
    worker = call(
        shared_daemon,
        "names_a_pid",
        """
def introduce(self, token):
    own = present(self._door, {"token": token, "pid": 1, "uid": 0, "process": 1})
    os.close(self._door)
    if not own.recv(wire.MESSAGE_BYTES): os._exit(1)
    return own
Server._introduce = introduce
honest_say = Server._say
Server._say = lambda self, header: honest_say(self, {**header, "pid": 1, "uid": 0})
""",
    )
    assert worker["start"] == "forked"
    assert psutil.Process(1).is_running()


def test_t34_a_fork_server_that_comes_itself_is_not_believed(shared_daemon: Host) -> None:
    worker = call(shared_daemon, "comes_itself", "def bear(self, frame):\n    self.kept = present(self._door, {'token': frame.header['token']})\n    fresh(self, frame)\nServer._bear = bear\n")
    assert (worker["start"], worker["start_reason"]) == ("plain", NOT_BELIEVED)


def test_t34_a_child_whose_end_the_daemon_could_not_see_is_not_believed(shared_daemon: Host) -> None:
    """One fork instead of two: it would stay the server's child."""
    worker = call(
        shared_daemon,
        "one_fork",
        """
def bear(self, frame):
    fresh(self, frame)
    if not os.fork():
        present(self._door, {"token": frame.header["token"]}).recv(1)
        os._exit(0)
Server._bear = bear
""",
    )
    assert (worker["start"], worker["start_reason"]) == ("plain", NOT_BELIEVED)


STRANGER = """
import os, socket, sys
ours = socket.socket(fileno=int(sys.argv[1]))
token, fds, _, _ = socket.recv_fds(ours, 1000, 1)
sys.path.insert(0, sys.argv[2])
from remoted_client import wire
if sys.argv[3] != "0":
    os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
try:
    sock.connect(f"/proc/self/fd/{fds[0]}")
    wire.send(sock, wire.encode({"op": "born", "token": token.decode()}))
    print("connected", len(sock.recv(1000)), flush=True)
except OSError as error:
    print(type(error).__name__, flush=True)
"""
HANDS_ON = """
def bear(self, frame):
    fresh(self, frame)
    line = socket.socket(socket.AF_UNIX)
    line.connect(os.environ["STRANGER"])
    socket.send_fds(line, [frame.header["token"].encode()], [self._door])
    line.recv(1)  # the stranger has tried
    frame.close()
Server._bear = bear
"""


def stranger(daemon: Host, changes_user: bool) -> tuple[str, threading.Thread, list[str]]:
    """A process that is no child of the daemon's waits for a door key and a token, and comes with them."""
    path = str(daemon.folder / f"x{int(changes_user)}")
    listener = socket.socket(socket.AF_UNIX)
    listener.bind(path)
    listener.listen()
    listener.settimeout(60)
    heard: list[str] = []

    def act() -> None:
        line, _ = listener.accept()
        with listener, line:
            argv = [sys.executable, "-c", STRANGER, str(line.fileno()), daemon.environ["PYTHONPATH"].split(os.pathsep)[1], str(int(changes_user))]
            heard.append(subprocess.run(argv, pass_fds=(line.fileno(),), stdout=subprocess.PIPE, text=True, timeout=60).stdout.strip())

    thread = threading.Thread(target=act)
    thread.start()
    return path, thread, heard


def test_t34_a_stranger_with_the_key_and_the_token_is_not_believed(shared_daemon: Host) -> None:
    path, thread, heard = stranger(shared_daemon, changes_user=False)
    worker = call(shared_daemon, "hands_on", HANDS_ON, STRANGER=path)
    thread.join(60)

    assert heard == ["connected 0"]
    assert (worker["start"], worker["start_reason"]) == ("plain", NOT_BELIEVED)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: a process of another user's")
def test_t34_another_users_process_with_the_key_and_the_token_is_kept_out(shared_daemon: Host) -> None:
    """The socket is its user's alone; whoever got through that all the same is told apart by its uid."""
    path, thread, heard = stranger(shared_daemon, changes_user=True)
    worker = call(shared_daemon, "hands_on_to_another", HANDS_ON.replace("    frame.close()", "    self._refuse(frame, 'nobody came')\n    frame.close()"), STRANGER=path)
    thread.join(60)

    assert heard == ["PermissionError"]
    assert (worker["start"], worker["start_reason"]) == ("plain", "nobody came")


async def test_t34_the_uid_of_who_comes_is_what_the_kernel_says(tmp_path: Path) -> None:
    """A door of somebody else's fork server: this process holds key and token, and has the wrong uid."""
    door, itself = Door(tmp_path, os.geteuid() + 1), os.pidfd_open(os.getpid())
    try:
        born = door.expect("token")
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as sock:
            sock.connect(f"/proc/self/fd/{door.key}")
            door.belongs_to(Process(os.getpid(), itself))
            wire.send(sock, wire.encode({"op": "born", "token": "token", "uid": os.geteuid() + 1}))
            with pytest.raises(NotBelieved, match="another user's process"):
                await born
        assert not list(tmp_path.iterdir()), "the socket has no name"
    finally:
        door.close(NotBelieved("the test is over"))
        os.close(itself)


HOSTILE = {
    "garbage": "def bear(self, frame): self._sock.send(os.urandom(5000))\nServer._bear = bear\n",
    "ends": "def bear(self, frame): os._exit(5)\nServer._bear = bear\n",
    "wrong-token": "def bear(self, frame):\n    fresh(self, frame)\n    self.kept = present(self._door, {'token': '0' * 32})\n    self._refuse(frame, 'no')\nServer._bear = bear\n",
    "not-a-problem": "def bear(self, frame): self._say({'op': 'refused', 'token': frame.header['token'], 'problem': {'a': [1]}, 'stale': 3})\nServer._bear = bear\n",
    "silent-crowd": "def bear(self, frame):\n    self.kept = []\n    for _ in range(100):\n        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); sock.setblocking(False)\n"
    "        try: sock.connect(f'/proc/self/fd/{self._door}')\n        except BlockingIOError: pass\n        self.kept.append(sock)\n    self._refuse(frame, 'a crowd')\nServer._bear = bear\n",
}


@pytest.mark.parametrize("how", HOSTILE)
def test_t34_a_fork_server_that_breaks_the_protocol_costs_no_job(shared_daemon: Host, how: str) -> None:
    worker = call(shared_daemon, "hostile_" + how.replace("-", "_"), HOSTILE[how])
    assert worker["start"] == "plain"
    assert worker["start_reason"]
