"""Runs in the machine as root: reads commands from the host, one JSON document a line, and says line by line what they print.

Standard library only. Many commands run at once; each is somebody's, with the groups that the machine knows for him.
"""

from __future__ import annotations

import contextlib
import json
import os
import pwd
import subprocess
import threading
from pathlib import Path
from typing import Any, BinaryIO

_NAME = "remoted.agent"
_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"


def main() -> None:
    """Until the power is gone."""
    port = next(path.parent for path in Path("/sys/class/virtio-ports").glob("*/name") if path.read_text(encoding="ascii").strip() == _NAME)
    with open(f"/dev/{port.name}", "r+b", buffering=0) as wire:
        say = _Mouth(wire)
        say(hello=Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip())
        pending = b""
        while True:
            pending += wire.read(65536) or b""
            *lines, pending = pending.split(b"\n")
            for line in lines:
                threading.Thread(target=_run, args=(json.loads(line), say), daemon=True).start()


class _Mouth:
    """One document at a time."""

    def __init__(self, wire: BinaryIO) -> None:
        self._wire = wire
        self._lock = threading.Lock()

    def __call__(self, **document: Any) -> None:
        data = json.dumps(document).encode() + b"\n"
        with self._lock:
            while data:
                data = data[self._wire.write(data) :]


def _run(order: dict[str, Any], say: _Mouth) -> None:
    number = order["number"]
    try:
        process = subprocess.Popen(order["argv"], **_as(order["uid"]), stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True)
    except OSError as error:
        say(number=number, line=str(error))
        say(number=number, code=127)
        return
    threading.Thread(target=_feed, args=(process.stdin, order["text"].encode()), daemon=True).start()
    for line in process.stdout:
        say(number=number, line=line.decode(errors="replace").rstrip("\n"))
    say(number=number, code=process.wait())


def _feed(pipe: BinaryIO, data: bytes) -> None:
    with contextlib.suppress(BrokenPipeError), pipe:
        pipe.write(data)


def _as(uid: int) -> dict[str, Any]:
    """Popen's words for being somebody; a uid without an account has itself as its only group."""
    try:
        account = pwd.getpwuid(uid)
        name, home, gid, groups = account.pw_name, account.pw_dir, account.pw_gid, os.getgrouplist(account.pw_name, account.pw_gid)
    except KeyError:
        name, home, gid, groups = str(uid), f"/home/{uid}", uid, [uid]
    environ = {"PATH": _PATH, "LANG": "C.UTF-8", "HOME": home, "USER": name, "PYTHONWARNINGS": "default"}
    return {"user": uid, "group": gid, "extra_groups": groups, "cwd": home, "env": environ}


if __name__ == "__main__":
    main()
