"""One advisory lock per GPU between the daemons of several users on one host (MECHANISMS 7).

Best effort: everybody may create the files, nobody must honour them, and ``doctor`` says "advisory". The lock goes
with the process that holds it, however it ends. An existing file is opened without O_CREAT, because
``fs.protected_regular`` forbids that for another user's file in a sticky directory (Documentation/admin-guide/sysctl/fs.rst).
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from pathlib import Path

from remoted.model import DeviceUuid

DEFAULT_FOLDER = Path("/run/lock")


class DeviceLocks:
    """The locks that this daemon holds, by device."""

    def __init__(self, folder: Path = DEFAULT_FOLDER) -> None:
        self._folder = folder
        self._held: dict[DeviceUuid, int] = {}

    def acquire(self, devices: tuple[DeviceUuid, ...]) -> bool:
        """All of them or none. True as well where locks cannot be had at all: they are advisory."""
        taken: list[DeviceUuid] = []
        for uuid in devices:
            if uuid not in self._held and not self._lock(uuid):
                self.release(tuple(taken))
                return False
            taken.append(uuid)
        return True

    def _lock(self, uuid: DeviceUuid) -> bool:
        try:
            fd = self._open(uuid)
        except OSError:
            return True
        try:
            fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(fd)
            return False
        self._held[uuid] = fd
        return True

    def _open(self, uuid: DeviceUuid) -> int:
        path = self._folder / f"remoted-{re.sub(r'[^A-Za-z0-9-]', '_', uuid)}.lock"
        flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW
        with contextlib.suppress(FileNotFoundError):
            return os.open(path, flags)
        return os.open(path, flags | os.O_CREAT, 0o444)

    def release(self, devices: tuple[DeviceUuid, ...]) -> None:
        for uuid in devices:
            fd = self._held.pop(uuid, None)
            if fd is not None:
                os.close(fd)

    def taken_by_others(self, devices: tuple[DeviceUuid, ...]) -> set[DeviceUuid]:
        """Devices whose lock another daemon holds now."""
        taken: set[DeviceUuid] = set()
        for uuid in devices:
            if uuid in self._held:
                continue
            if self._lock(uuid):
                self.release((uuid,))
            else:
                taken.add(uuid)
        return taken
