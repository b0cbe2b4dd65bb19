"""T50: whatever of the last writes a power cut leaves, what was acknowledged is there, once, and the database is whole.

The daemon's writes are recorded with strace. From the record disks are made as a power cut may leave them (reference:
SQLite's crash tests, and CrashMonkey, OSDI '18): all that was synced, and of every later write all, nothing, or some
of its sectors. REMOTED_TEST_IMAGES says how many; each is opened as the next daemon would.
"""

from __future__ import annotations

import os
import random
import re
import shutil
import sqlite3
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from tests.harness import Host, wait_until

pytestmark = pytest.mark.root

IMAGES = int(os.environ.get("REMOTED_TEST_IMAGES", "200"))
SECTOR = 512
SCRIPT = """
import os, time
from remoted_client import remote, CpuLiveServerless
@remote(CpuLiveServerless(name="power", workersMax=1))
def f(x): return x
f(0).result().unwrap()
open("ready", "w").close()
while not os.path.exists("go"): time.sleep(0.01)
for n in range(60): f(n).result().unwrap()
list(f.map(range(300)))
"""
_CALL = re.compile(r"^(\d+) +(\w+)\((.*)$")
_RESUMED = re.compile(r"^(\d+) +<\.\.\. (\w+) resumed>")
_FILE = re.compile(r"^\d+<([^>]*)>")
_HEX = re.compile(r'"((?:\\x[0-9a-f]{2})*)"')
_LAST = re.compile(r", (\d+)(?:\)| <unfinished)[^,]*$")
_TOLD = {op: re.compile(rb'"op":"%s","calls":\[(.*?)\],"sizes"' % op) for op in (b"accepted", b"done")}
_ACCEPTED = re.compile(rb'\["[0-9a-f]+","([0-9a-f]{32})"\]')
#: One that has not completed says its status.
_DONE = re.compile(rb'\{"id":"([0-9a-f]{32})",(?![^}]*"status")')


@dataclass
class Disk:
    """One file: what is certain to be on the disk, and the writes that may or may not be."""

    synced: bytearray
    pending: list[tuple[int, bytes]] = field(default_factory=list)

    def write(self, offset: int, data: bytes) -> None:
        self.pending.append((offset, data))

    def sync(self) -> None:
        for offset, data in self.pending:
            _put(self.synced, offset, data)
        self.pending.clear()

    def after_a_cut(self, chance: random.Random) -> bytes:
        image = bytearray(self.synced)
        for offset, data in self.pending:
            fate = chance.choice(("kept", "lost", "torn"))
            for start in range(0, len(data), SECTOR):
                if fate == "kept" or (fate == "torn" and chance.random() < 0.5):
                    _put(image, offset + start, data[start : start + SECTOR])
        return bytes(image)


def _put(image: bytearray, offset: int, data: bytes) -> None:
    if len(image) < offset + len(data):
        image.extend(bytes(offset + len(data) - len(image)))
    image[offset : offset + len(data)] = data


def _events(trace: Path) -> Iterator[tuple[str, str, bytes, str]]:
    """(call, file, bytes, the rest), in the order of their ends; what is sent counts from its beginning."""
    begun: dict[str, str] = {}
    for line in trace.read_text(encoding="ascii").splitlines():
        if (match := _CALL.match(line)) is not None:
            pid, name, rest = match.groups()
            if name.startswith("send"):
                yield name, "", _bytes_of(rest), rest
            elif rest.endswith("<unfinished ...>"):
                begun[pid] = rest
            else:
                yield name, *_parsed(rest)
        elif (match := _RESUMED.match(line)) is not None and match[1] in begun:
            yield match[2], *_parsed(begun.pop(match[1]))


def _parsed(rest: str) -> tuple[str, bytes, str]:
    found = _FILE.match(rest)
    return (bytes.fromhex(found[1].replace("\\x", "")).decode() if found else ""), _bytes_of(rest), rest


def _last_number(rest: str) -> int:
    """The offset or length that ends the arguments."""
    found = _LAST.search(rest)
    assert found is not None, rest[-80:]
    return int(found[1])


def _bytes_of(rest: str) -> bytes:
    found = _HEX.search(rest)
    return bytes.fromhex(found[1].replace("\\x", "")) if found else b""


def _record(host: Host, trace: Path) -> dict[str, bytes]:
    """Let a script submit while the daemon is traced; the files as they were before."""
    assert host.process is not None
    client = host.popen(SCRIPT)
    wait_until(lambda: (host.project / "ready").exists(), 30, host.log)
    folder = host.state / "remoted"
    before = {name: (folder / name).read_bytes() for name in ("remoted.sqlite3", "remoted.sqlite3-wal")}
    calls = "trace=pwrite64,fdatasync,fsync,ftruncate,sendto,sendmsg"
    tracer = subprocess.Popen(["strace", "-f", "-qq", "-y", "-xx", "-s", "300000", "-e", calls, "-e", "signal=none", "-o", str(trace), "-p", str(host.process.pid)], stderr=subprocess.DEVNULL)
    status = Path(f"/proc/{host.process.pid}/status")
    wait_until(lambda: "TracerPid:\t0\n" not in status.read_text(encoding="ascii", errors="replace"), 30)
    (host.project / "go").touch()
    out, err = client.communicate(timeout=100)
    tracer.terminate()
    tracer.wait()
    assert client.returncode == 0, out + err
    return before


def _check(folder: Path, images: dict[str, bytes], accepted: set[str], done: set[str]) -> None:
    for name, data in images.items():
        (folder / name).write_bytes(data)
    connection = sqlite3.connect(folder / "remoted.sqlite3")
    try:
        assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        stored = dict(connection.execute("SELECT id, status FROM jobs").fetchall())
    finally:
        connection.close()
    assert accepted <= stored.keys(), "an acknowledged job is gone"
    assert all(stored[job] == "COMPLETED" for job in done), "an outcome that was told is gone"


def test_t50_a_power_cut_at_any_write_loses_nothing_that_was_acknowledged(daemon: Host, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    disks = {name: Disk(bytearray(data)) for name, data in _record(daemon, trace).items()}
    events = list(_events(trace))
    writes = [number for number, event in enumerate(events) if event[0] in ("pwrite64", "fdatasync", "fsync")]
    chance = random.Random(50)
    cuts = sorted(chance.choices(writes, k=IMAGES))
    assert len(writes) > 1000, "the recorder saw next to nothing"
    accepted: set[str] = set()
    done: set[str] = set()
    for number, (call, file, data, rest) in enumerate(events):
        while cuts and cuts[0] == number:
            cuts.pop(0)
            folder = tmp_path / "image"
            folder.mkdir()
            _check(folder, {name: disk.after_a_cut(chance) for name, disk in disks.items()}, accepted, done)
            shutil.rmtree(folder)
        accepted.update(job.decode() for told in _TOLD[b"accepted"].findall(data) for job in _ACCEPTED.findall(told))
        done.update(job.decode() for told in _TOLD[b"done"].findall(data) for job in _DONE.findall(told))
        disk = disks.get(Path(file).name)
        if disk is None:
            continue
        if call == "pwrite64":
            disk.write(_last_number(rest), data)
        elif call == "ftruncate":
            disk.sync()
            del disk.synced[_last_number(rest) :]
        elif call in ("fdatasync", "fsync"):
            disk.sync()
    assert len(accepted) >= 200  # of a single call the end says it too
    assert len(done) >= 350
