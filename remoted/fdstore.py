"""What systemd keeps of each worker for the next daemon: an entry of five descriptors, and how one is believed (decision 0040).

Channel, pidfd, the read ends of stdout and stderr, and a sealed memfd in which the daemon that made the entry says what they
are. No worker has that memory, and only a daemon can have written it (NotifyAccess=main). All the same nothing of an entry
is used before it agrees with what the kernel says of its descriptors.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import logging
import os
import re
import secrets
import socket
import stat
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from remoted.cgroup import Bounds
from remoted.model import DeviceUuid, Uid, WorkerId
from remoted.scheduler.matching import GpuRequest
from remoted.scheduler.state import Need, PoolPolicy
from remoted.spawn import reaper
from remoted.supervisor import Supervisor
from remoted_client import wire

log = logging.getLogger(__name__)
_FORMAT = 1
_SEALS = fcntl.F_SEAL_SEAL | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_WRITE
_ABOUT_BYTES = 1 << 20
_KEY_BYTES = 32
#: Those of an entry that are told apart by their inodes.
_PARTS = ("channel", "stdout", "stderr")
#: A start time is known to a tick of 10 ms.
_START_TOLERANCE_SECONDS = 0.011


class NotBelieved(Exception):
    """An entry that is of no use; the message says why."""


@dataclass(frozen=True, slots=True)
class Handles:
    """What a daemon holds of a living worker."""

    channel: int
    pidfd: int
    stdout: int
    stderr: int

    def __iter__(self) -> Any:
        return iter((self.channel, self.pidfd, self.stdout, self.stderr))


@dataclass(frozen=True, slots=True)
class About:
    """A worker as the scheduler and ``remotectl`` know it, and the process that it is."""

    id: WorkerId
    pid: int
    #: Seconds since boot.
    born: float
    started_at: float
    need: Need
    policy: PoolPolicy
    devices: tuple[DeviceUuid, ...]
    bounds: Bounds
    python: tuple[int, ...]
    cloudpickle: str
    #: Which fork server bore it, or why none did.
    server: str
    reason: str

    def is_process(self, pid: int, started: float) -> bool:
        """Is that the same one?"""
        return pid == self.pid and abs(started - self.born) <= _START_TOLERANCE_SECONDS


@dataclass(frozen=True, slots=True)
class Entry:
    """One worker. Of those that are taken out of the store the descriptors are the taker's."""

    about: About
    handles: Handles


class FdStore:
    """The entries of this daemon's workers. Without systemd nothing is kept, and nothing is found."""

    def __init__(self, supervisor: Supervisor, boot_id: str) -> None:
        self._supervisor = supervisor
        self._boot_id = boot_id
        self._kept: set[str] = set()
        #: With this key of kinds (``spec.kind_id``) the found workers' kinds are those of the same calls as before.
        self.kind_key = secrets.token_bytes(_KEY_BYTES)

    def take(self) -> list[Entry]:
        """What earlier daemons have left and is believed; the rest is closed, here and in the store."""
        found: list[Entry] = []
        for name, fds in self._supervisor.take_stored().items():
            try:
                found.append(self._read(name, fds))
                self._kept.add(name)
            except (NotBelieved, OSError) as error:
                log.warning("%s, stored for this daemon, is not taken: %s", name or "something without a name", error)
                wire.close_all(fds)
                self._supervisor.unstore(name)
        return found

    def keeps(self, worker: str) -> bool:
        """Will the next daemon find it?"""
        return worker in self._kept

    def keep(self, entry: Entry) -> None:
        """From now on this worker outlives this daemon. The descriptors stay the caller's."""
        about, handles = entry.about, entry.handles
        inodes = {part: _inode(getattr(handles, part)) for part in _PARTS}
        document = {"format": _FORMAT, "protocol": wire.PROTOCOL, "boot_id": self._boot_id, "kind_key": self.kind_key.hex(), "inodes": inodes, **asdict(about)}
        fd = wire.memfd("remoted-worker", json.dumps(document).encode())
        try:
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            if self._supervisor.store(about.id, (*handles, fd)):
                self._kept.add(about.id)
        finally:
            os.close(fd)

    def forget(self, worker: str) -> None:
        """It is buried."""
        if worker in self._kept:
            self._kept.discard(worker)
            self._supervisor.unstore(worker)

    def _read(self, name: str, fds: list[int]) -> Entry:
        """Raises NotBelieved, and then the descriptors are untouched."""
        by_inode = {_inode(fd): fd for fd in fds}
        about_fd = next((fd for fd in fds if _is_sealed(fd)), None)
        if about_fd is None or len(fds) != 5:
            raise NotBelieved(f"it has {len(fds)} descriptors, or nothing that says what they are")
        document = _document(about_fd)
        try:
            about = _parse(document)
            named = {by_inode.get(document["inodes"][part], -1): part for part in _PARTS}
            pidfd = next((fd for fd in fds if fd != about_fd and fd not in named), -1)
            key = bytes.fromhex(document["kind_key"])
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise NotBelieved(f"it cannot be read: {error!r}") from error
        if -1 in named or len(named) != len(_PARTS):
            raise NotBelieved("its descriptors are not those that were stored")
        self._check(name, document, about, pidfd)
        handles = Handles(**{part: fd for fd, part in named.items()}, pidfd=pidfd)
        if not _is_channel(handles.channel):
            raise NotBelieved("its channel is none")
        os.close(about_fd)
        self.kind_key = key
        return Entry(about, handles)

    def _check(self, name: str, document: Mapping[str, Any], about: About, pidfd: int) -> None:
        if document["boot_id"] != self._boot_id:
            raise NotBelieved("it is of an earlier boot")
        if document["protocol"] != wire.PROTOCOL:
            raise NotBelieved(f"its worker speaks protocol {document['protocol']}")
        if about.id != name or not re.fullmatch(r"w[0-9a-f]{1,16}-[0-9]{1,12}", name):
            raise NotBelieved("its name is no worker's")
        pid = _pid_of(pidfd)
        if pid == 0 or (pid > 0 and not about.is_process(pid, reaper.started_at(pid))):
            raise NotBelieved(f"its process is not {about.pid}")


def _parse(document: Mapping[str, Any]) -> About:
    """Raises KeyError, TypeError, ValueError, and NotBelieved."""
    if document["format"] != _FORMAT:
        raise NotBelieved(f"it was written by another version (format {document['format']})")
    need = document["need"]
    gpu = GpuRequest(tuple(need["gpu"]["alternatives"]), int(need["gpu"]["count"])) if need["gpu"] else None
    uid, kind, name = need["pool"]
    return About(
        id=WorkerId(document["id"]),
        pid=int(document["pid"]),
        born=float(document["born"]),
        started_at=float(document["started_at"]),
        need=Need(Uid(need["uid"]), (uid, kind, name), need["kind"], gpu, need["concurrency"], environment=need["environment"], instance=need["instance"]),
        policy=PoolPolicy(**document["policy"]),
        devices=_devices(document["devices"]),
        bounds=Bounds(**document["bounds"]),
        python=tuple(document["python"]),
        cloudpickle=document["cloudpickle"],
        server=document["server"],
        reason=document["reason"],
    )


def _devices(found: Iterable[str]) -> tuple[DeviceUuid, ...]:
    return tuple(DeviceUuid(uuid) for uuid in found)


def _document(fd: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(fd, _ABOUT_BYTES, 0))
    except ValueError as error:
        raise NotBelieved(f"it cannot be read: {error}") from error
    if not isinstance(found, dict):
        raise NotBelieved("it cannot be read: it is no object")
    return found


def _inode(fd: int) -> str:
    found = os.fstat(fd)
    return f"{found.st_dev}:{found.st_ino}"


def _is_sealed(fd: int) -> bool:
    with contextlib.suppress(OSError):
        return fcntl.fcntl(fd, fcntl.F_GET_SEALS) == _SEALS
    return False


def _is_channel(fd: int) -> bool:
    if not stat.S_ISSOCK(os.fstat(fd).st_mode):
        return False
    with socket.socket(fileno=os.dup(fd)) as sock:
        return sock.family == socket.AF_UNIX and sock.type == socket.SOCK_SEQPACKET


def _pid_of(pidfd: int) -> int:
    """Whose it is: -1 once that is dead and collected, 0 if it is no pidfd (proc(5), /proc/PID/fdinfo)."""
    with contextlib.suppress(OSError, ValueError):
        for line in Path(f"/proc/self/fdinfo/{pidfd}").read_text(encoding="ascii").splitlines():
            if line.startswith("Pid:"):
                return int(line.split()[1])
    return 0
