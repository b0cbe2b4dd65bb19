"""What is stored of a worker, and what the next daemon believes of it (decision 0040; T63)."""

from __future__ import annotations

import array
import contextlib
import fcntl
import os
import random
import socket
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from remoted import channel, fdstore
from remoted.cgroup import Bounds
from remoted.fdstore import About, Entry, FdStore, Handles
from remoted.model import DeviceUuid, Uid, WorkerId
from remoted.scheduler.matching import GpuRequest
from remoted.scheduler.state import Need, PoolPolicy
from remoted.spawn import reaper
from remoted.supervisor import Supervisor
from remoted_client import wire

BOOT = "6a9f0c1e-0000-4000-8000-000000000000"
NEED = Need(Uid(7), (7, "LiveServerless", "train"), "kind", GpuRequest(("ANY", "AMPERE_16"), 2), 3, "environment", None)
NAME = WorkerId("w12ab-3")


class Store:
    """The other end of NOTIFY_SOCKET: descriptors by name."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "notify"
        self.found: dict[str, list[int]] = {}
        self.removed: list[str] = []
        self._sock = socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM)
        self._sock.bind(str(self.path))
        self._sock.setblocking(False)

    def supervisor(self) -> Supervisor:
        """Of a daemon that finds what is stored now, in some order."""
        entries = [(name, fd) for name, fds in self.found.items() for fd in fds]
        random.shuffle(entries)
        first = 400
        for number, (_, fd) in enumerate(entries):
            os.dup2(fd, first + number)
        environ = {"NOTIFY_SOCKET": str(self.path), "LISTEN_PID": str(os.getpid()), "LISTEN_FDS": str(len(entries)), "LISTEN_FDNAMES": ":".join(name for name, _ in entries)}
        return Supervisor(environ, first)

    def hear(self) -> None:
        with contextlib.suppress(BlockingIOError):
            while True:
                data, ancillary, _, _ = self._sock.recvmsg(4096, socket.CMSG_SPACE(64))
                said = dict(word.split("=") for word in data.decode().splitlines())
                fds = array.array("i", b"".join(payload for _, _, payload in ancillary))
                if "FDSTORE" in said:
                    assert said == {"FDSTORE": "1", "FDPOLL": "0", "FDNAME": said["FDNAME"]}
                    self.found.setdefault(said["FDNAME"], []).extend(fds)
                else:
                    assert said == {"FDSTOREREMOVE": "1", "FDNAME": said["FDNAME"]}
                    self.removed.append(said["FDNAME"])

    def close(self) -> None:
        self._sock.close()
        wire.close_all(fd for fds in self.found.values() for fd in fds)


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    made = Store(tmp_path)
    yield made
    made.close()


@pytest.fixture
def entry() -> Iterator[Entry]:
    """Of a living process."""
    process = subprocess.Popen(["sleep", "600"])
    ours, theirs = channel.pair()
    pipes = [os.pipe2(os.O_CLOEXEC) for _ in range(2)]
    handles = Handles(ours.fileno(), os.pidfd_open(process.pid), pipes[0][0], pipes[1][0])
    about = About(NAME, process.pid, reaper.started_at(process.pid), 1e9, NEED, PoolPolicy(1, 2, 3.5), (DeviceUuid("GPU-1"),), Bounds(1 << 30, 2.0, 64), (3, 11, 4), "3.1.0", "f1", "")
    yield Entry(about, handles)
    process.kill()
    process.wait()
    os.close(handles.pidfd)
    ours.close()
    theirs.close()
    wire.close_all(fd for pair in pipes for fd in pair)


def same_file(one: int, other: int) -> bool:
    return os.path.samestat(os.fstat(one), os.fstat(other))


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def test_c09_a_worker_that_was_stored_is_found_with_all_its_descriptors(store: Store, entry: Entry) -> None:
    first = FdStore(store.supervisor(), BOOT)
    first.keep(entry)
    store.hear()
    assert {name: len(fds) for name, fds in store.found.items()} == {NAME: 5}

    second = FdStore(store.supervisor(), BOOT)
    (found,) = second.take()

    assert found.about == entry.about
    assert all(same_file(one, other) for one, other in zip(found.handles, entry.handles, strict=True))
    assert second.kind_key == first.kind_key, "the same calls are of the same kinds"
    assert second.keeps(NAME)
    second.forget(NAME)
    store.hear()
    assert store.removed == [NAME]
    wire.close_all(found.handles)


def test_c09_a_worker_that_died_meanwhile_is_found_all_the_same(store: Store, entry: Entry) -> None:
    """What it said before is still to be read."""
    FdStore(store.supervisor(), BOOT).keep(entry)
    store.hear()
    os.kill(entry.about.pid, 9)
    os.waitpid(entry.about.pid, 0)

    (found,) = FdStore(store.supervisor(), BOOT).take()

    assert found.about == entry.about
    wire.close_all(found.handles)


def of_another_boot(store: Store, entry: Entry) -> None:
    FdStore(store.supervisor(), "another").keep(entry)


def of_an_older_process(store: Store, entry: Entry) -> None:
    FdStore(store.supervisor(), BOOT).keep(replace(entry, about=replace(entry.about, born=entry.about.born - 1)))


def of_another_process(store: Store, entry: Entry) -> None:
    pidfd = os.pidfd_open(os.getpid())
    FdStore(store.supervisor(), BOOT).keep(replace(entry, handles=replace(entry.handles, pidfd=pidfd)))
    os.close(pidfd)


def without_a_process(store: Store, entry: Entry) -> None:
    null = os.open("/dev/null", os.O_RDONLY)
    FdStore(store.supervisor(), BOOT).keep(replace(entry, handles=replace(entry.handles, pidfd=null)))
    os.close(null)


def with_a_pipe_for_a_channel(store: Store, entry: Entry) -> None:
    handles = entry.handles
    FdStore(store.supervisor(), BOOT).keep(replace(entry, handles=replace(handles, channel=handles.stdout, stdout=handles.channel)))


def incomplete(store: Store, entry: Entry) -> None:
    FdStore(store.supervisor(), BOOT).keep(entry)
    store.hear()
    os.close(store.found[NAME].pop())


def with_other_pipes(store: Store, entry: Entry) -> None:
    FdStore(store.supervisor(), BOOT).keep(entry)
    store.hear()
    reading, writing = os.pipe()
    index = next(number for number, fd in enumerate(store.found[NAME]) if same_file(fd, entry.handles.stdout))
    os.close(store.found[NAME][index])
    store.found[NAME][index] = reading
    os.close(writing)


def under_another_name(store: Store, entry: Entry) -> None:
    FdStore(store.supervisor(), BOOT).keep(entry)
    store.hear()
    store.found["w12ab-4"] = store.found.pop(NAME)


def with_unsealed_words(store: Store, entry: Entry) -> None:
    """As anybody could write who had the descriptor."""
    FdStore(store.supervisor(), BOOT).keep(entry)
    store.hear()
    fds = store.found[NAME]
    index = next(number for number, fd in enumerate(fds) if fdstore._is_sealed(fd))
    words = os.pread(fds[index], 1 << 20, 0)
    os.close(fds[index])
    fds[index] = wire.memfd("forged", words)
    assert fcntl.fcntl(fds[index], fcntl.F_GET_SEALS) == 0


def something_else(store: Store, entry: Entry) -> None:
    store.found["something"] = [os.open("/dev/null", os.O_RDONLY)]


@pytest.mark.parametrize(
    "leave",
    [of_another_boot, of_an_older_process, of_another_process, without_a_process, with_a_pipe_for_a_channel, incomplete, with_other_pipes, under_another_name, with_unsealed_words, something_else],
)
def test_t63_what_does_not_agree_with_the_kernel_is_closed_here_and_in_the_store(store: Store, entry: Entry, leave: Callable[[Store, Entry], None]) -> None:
    leave(store, entry)
    store.hear()
    before = open_descriptors()

    assert FdStore(store.supervisor(), BOOT).take() == []

    assert open_descriptors() == before
    store.hear()
    assert store.removed == list(store.found)


def test_t63_another_versions_worker_is_left_to_end_by_itself(store: Store, entry: Entry, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(wire, "PROTOCOL", 0)
        FdStore(store.supervisor(), BOOT).keep(entry)
    store.hear()

    assert FdStore(store.supervisor(), BOOT).take() == []


def test_c02_without_systemd_nothing_is_kept_and_nothing_found(entry: Entry) -> None:
    none = FdStore(Supervisor({}), BOOT)
    none.keep(entry)

    assert not none.keeps(NAME)
    assert none.take() == []
