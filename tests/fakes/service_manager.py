"""What systemd does for a service that stores descriptors: it holds them, and hands them to the next start of the service.

As sd_notify(3) and sd_listen_fds(3) say: words come as datagrams from the main process alone (SCM_CREDENTIALS), descriptors beside
them; FDSTORE=1 keeps them under FDNAME, FDSTOREREMOVE=1 closes all of a name; without FDPOLL=0 an entry goes when the other end
does, which no test needs. The next process gets them from 3 on, behind the listening sockets, in no order that it could rely on.
"""

from __future__ import annotations

import array
import contextlib
import json
import os
import random
import signal
import socket
import struct
import subprocess
import sys
import threading
from pathlib import Path

from tests.harness import Host, wait_until

_MOST_FDS = 253
#: Becomes the daemon with the descriptors at their places.
_LAUNCHER = """
import fcntl, json, os, sys
fds, names, argv = json.loads(sys.argv[1])
moved = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, 3 + 2 * len(fds)) for fd in fds]
for number, fd in enumerate(moved): os.dup2(fd, 3 + number)
os.closerange(3 + len(fds), max([*fds, *moved]) + 1)
os.environ.update(LISTEN_PID=str(os.getpid()), LISTEN_FDS=str(len(fds)), LISTEN_FDNAMES=":".join(names))
os.execv(argv[0], argv)
"""


class ServiceManager:
    """One service's. The host's daemon is started and ended here."""

    def __init__(self, host: Host, **environ: str) -> None:
        self.host = host
        self._environ = environ
        #: What is stored, in the order in which it came.
        self.stored: list[tuple[str, int]] = []
        self.words: list[str] = []
        self._address = host.folder / "notify"
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.setsockopt(socket.SOL_SOCKET, socket.SO_PASSCRED, 1)
        self._sock.bind(str(self._address))
        self._lock = threading.Lock()
        host.sockets.mkdir(mode=0o700, exist_ok=True)
        self._listening = [_listen(host.sockets / name) for name in ("data.sock", "api.sock")]
        self._thread = threading.Thread(target=self._serve, daemon=True)
        self._thread.start()

    # -- what the service says -----------------------------------------------------------------------------

    def _serve(self) -> None:
        space = socket.CMSG_SPACE(_MOST_FDS * 4) + socket.CMSG_SPACE(struct.calcsize("iII"))
        while True:
            try:
                data, ancillary, _, _ = self._sock.recvmsg(65536, space, socket.MSG_CMSG_CLOEXEC)
            except OSError:
                return
            if data == b"end":
                return
            self._hear(data.decode().splitlines(), ancillary)

    def _hear(self, words: list[str], ancillary: list[tuple[int, int, bytes]]) -> None:
        fds, sender = array.array("i"), 0
        for _, kind, payload in ancillary:
            if kind == socket.SCM_RIGHTS:
                fds.frombytes(payload)
            else:
                sender = struct.unpack("iII", payload)[0]
        said = dict(word.split("=", 1) for word in words)
        with self._lock:
            self.words += words
            if self.host.process is not None and sender != self.host.process.pid:
                return  # NotifyAccess=main
            if said.get("FDSTORE") == "1":
                assert said["FDPOLL"] == "0"
                self.stored += [(said["FDNAME"], fd) for fd in fds]
            elif said.get("FDSTOREREMOVE") == "1":
                for name, fd in [entry for entry in self.stored if entry[0] == said["FDNAME"]]:
                    self.stored.remove((name, fd))
                    os.close(fd)

    def names(self) -> set[str]:
        """Of whom something is stored."""
        with self._lock:
            return {name for name, _ in self.stored}

    # -- the service ---------------------------------------------------------------------------------------

    def start(self) -> Host:
        """Until it says that it is ready."""
        with self._lock:
            shuffled = random.sample(self.stored, len(self.stored))
            self.words.clear()
            fds = [sock.fileno() for sock in self._listening] + [fd for _, fd in shuffled]
            names = ["remoted.socket"] * len(self._listening) + [name for name, _ in shuffled]
            argv = [sys.executable, "-m", "remoted", "--user", "--config", str(self.host.config)]
            with (self.host.folder / "daemon.log").open("ab") as log:
                self.host.process = subprocess.Popen(
                    [sys.executable, "-c", _LAUNCHER, json.dumps([fds, names, argv])],
                    env={**self.host.environ, "PYTHONWARNINGS": "default", "NOTIFY_SOCKET": str(self._address), **self._environ},
                    cwd="/",
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    pass_fds=fds,
                    start_new_session=True,
                )
        wait_until(self._is_ready, 30, self.host.log)
        return self.host

    def _is_ready(self) -> bool:
        assert self.host.process is not None
        assert self.host.process.poll() is None, self.host.log()
        return "READY=1" in self.words

    def end(self, how: signal.Signals) -> None:
        """The service ends, and what it stored stays: it is to be started again."""
        assert self.host.process is not None
        self.host.process.send_signal(how)
        self.host.process.wait(20)

    def restart(self, how: signal.Signals) -> Host:
        self.end(how)
        return self.start()

    def drop(self) -> None:
        """As after ``systemctl stop``: the store goes."""
        with self._lock:
            for _, fd in self.stored:
                os.close(fd)
            self.stored.clear()

    def close(self) -> None:
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.sendto(b"end", str(self._address))
        self._thread.join(5)
        self._sock.close()
        self.drop()
        for sock in self._listening:
            sock.close()


def _listen(path: Path) -> socket.socket:
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    sock.bind(str(path))
    path.chmod(0o600)
    sock.listen(1024)
    return sock
