"""The board of the fake driver: which cards there are, who uses them, what is broken.

``fake_nvml.c`` describes the file. A running daemon sees each ``write`` at its next call: cards change, strangers come
and go, calls hang and answer again. One process writes a board; others charge memory to it with ``claim``.
"""

from __future__ import annotations

import hashlib
import os
import subprocess
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Literal

GIB = 1 << 30

_SOURCE = Path(__file__).with_name("fake_nvml.c")
_COMPILE = ("gcc", "-std=gnu11", "-O1", "-shared", "-fPIC", "-Wall", "-Wextra", "-Wl,-soname,libnvidia-ml.so.1")

#: Which of NVML's lists a process stands in: compute, graphics, or both.
Lists = Literal["C", "G", "CG"]


class Fault(IntEnum):
    """The nvmlReturn_t that a failing call returns."""

    NOT_SUPPORTED = 3
    NO_PERMISSION = 4
    NOT_FOUND = 6
    DRIVER_NOT_LOADED = 9
    FUNCTION_NOT_FOUND = 13
    GPU_IS_LOST = 15
    RESET_REQUIRED = 16
    LIB_RM_VERSION_MISMATCH = 18
    UNKNOWN = 999


def build_library(directory: Path) -> Path:
    """Compile the fake driver into ``directory``, once per version of its source, and return the library's path."""
    digest = hashlib.sha256("\n".join(_COMPILE).encode() + _SOURCE.read_bytes()).hexdigest()[:16]
    library = directory / digest / "libnvidia-ml.so.1"
    if not library.exists():
        library.parent.mkdir(parents=True, exist_ok=True)
        fresh = library.with_name(f"{library.name}.{os.getpid()}")
        _run((*_COMPILE, "-o", str(fresh), str(_SOURCE), "-ldl", "-lpthread"))
        fresh.replace(library)
    return library


def _run(command: tuple[str, ...]) -> None:
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode:
        raise RuntimeError(f"cannot build the fake driver: {' '.join(command)} said:\n{result.stdout}{result.stderr}")


def claim(board: Path, uuid: str, used_bytes: int) -> None:
    """Charge ``used_bytes`` on a card to the calling process, until it claims another amount there or ends."""
    folder = board.with_name(f"{board.name}.d")
    folder.mkdir(exist_ok=True)
    own = folder / str(os.getpid())
    kept = [line for line in own.read_text().splitlines() if line.split()[1] != uuid] if own.exists() else []
    _publish(own, [*kept, f"use {uuid} {used_bytes}"])


def _publish(path: Path, lines: list[str]) -> None:
    fresh = path.with_name(f"{path.name}.{os.getpid()}.new")
    fresh.write_text("".join(f"{line}\n" for line in lines))
    fresh.replace(path)


@dataclass(frozen=True, slots=True)
class _Process:
    pid: int
    used_bytes: int | None
    lists: Lists

    def line(self) -> str:
        used = "-" if self.used_bytes is None else self.used_bytes
        return f"process {self.pid} {used} {self.lists}"


@dataclass(slots=True)
class _Entry:
    """A card, or a MIG slice with its place on the card."""

    uuid: str
    facts: dict[str, str]
    place: int | None = None
    processes: list[_Process] = field(default_factory=list)
    faults: dict[str, int] = field(default_factory=dict)
    slices: list[_Entry] = field(default_factory=list)

    def lines(self) -> list[str]:
        head = f"gpu {self.uuid}" if self.place is None else f"slice {self.uuid} {self.place}"
        facts = [f"{word} {value}" for word, value in self.facts.items()]
        faults = [f"fail {function} {code}" for function, code in self.faults.items()]
        processes = [process.line() for process in self.processes]
        return [head, *facts, *faults, *processes, *(line for part in self.slices for line in part.lines())]


class Board:
    """What the fake driver reports. Change it as you like, then ``write`` makes it true at one instant.

    board = Board(tmp_path / "board")
    card = board.add_gpu("NVIDIA GeForce RTX 3090", memory_bytes=24 * GIB)
    board.add_process(card, pid=4711, used_bytes=5 * GIB)
    board.write()
    """

    def __init__(self, path: Path, *, driver: str = "580.95.05", cuda: tuple[int, int] = (13, 0)) -> None:
        self.path = path
        self._head = [f"driver {driver}"]
        self._cuda = cuda
        self._cards: list[_Entry] = []
        self._faults: dict[str, int] = {}
        self._hangs: dict[str, int] = {}
        self._made = 0

    def add_gpu(
        self,
        name: str = "NVIDIA GeForce RTX 3090",
        *,
        memory_bytes: int = 24 * GIB,
        compute_capability: tuple[int, int] | None = (8, 6),
        minor: int | None = None,
        mig: bool | None = None,
    ) -> str:
        """Add a card and return its UUID; ``minor`` defaults to its place, ``mig`` None is a card that knows no MIG."""
        facts = {"name": name, "memory": str(memory_bytes), "minor": str(len(self._cards) if minor is None else minor)}
        if compute_capability is not None:
            facts["cc"] = f"{compute_capability[0]} {compute_capability[1]}"
        if mig is not None:
            facts["mig"] = str(int(mig))
        self._cards.append(_Entry(self._new_uuid("GPU"), facts | {"utilization": "0"}))
        return self._cards[-1].uuid

    def add_slice(self, card: str, name: str, *, memory_bytes: int, place: int) -> str:
        """Add a MIG device in one of the seven places of a card and return its UUID."""
        part = _Entry(self._new_uuid("MIG"), {"name": name, "memory": str(memory_bytes)}, place)
        self._entry(card).slices.append(part)
        return part.uuid

    def remove_gpu(self, uuid: str) -> None:
        self._cards.remove(self._entry(uuid))

    def set_fact(self, uuid: str, word: str, value: int) -> None:
        """Set a number of a device: ``reserved``, ``used``, ``utilization``, ``memory`` or ``minor``."""
        self._entry(uuid).facts[word] = str(value)

    def add_process(self, uuid: str, pid: int, used_bytes: int | None, lists: Lists = "C") -> None:
        """Put a process on a device; ``used_bytes`` None is what the driver says where it hides the number."""
        self._entry(uuid).processes.append(_Process(pid, used_bytes, lists))

    def remove_process(self, uuid: str, pid: int) -> None:
        entry = self._entry(uuid)
        entry.processes = [process for process in entry.processes if process.pid != pid]

    def set_cuda(self, major: int, minor: int) -> None:
        """Let the driver support this CUDA and older ones."""
        self._cuda = (major, minor)

    def set_fault(self, fault: Fault, *, function: str = "*", uuid: str | None = None) -> None:
        """Make a C function (default: every one) fail, on one device or everywhere, until ``clear_faults``."""
        faults = self._faults if uuid is None else self._entry(uuid).faults
        faults[function] = int(fault)

    def set_hang(self, *, function: str = "*", at_most_seconds: int = 60) -> None:
        """Make a C function block until ``clear_faults`` is written, and in any case not longer than stated."""
        self._hangs[function] = at_most_seconds

    def set_old_layout(self) -> None:
        """Let process lists come in the shorter structs of another driver version: garbage, not an error."""
        self._head.append("layout old")

    def clear_faults(self) -> None:
        self._faults.clear()
        self._hangs.clear()
        for card in self._cards:
            card.faults.clear()

    def write(self) -> None:
        """Publish the board with one rename, so that a call sees all of it or nothing."""
        faults = [f"fail {function} {code}" for function, code in self._faults.items()]
        hangs = [f"hang {function} {seconds}" for function, seconds in self._hangs.items()]
        cards = [line for card in self._cards for line in card.lines()]
        cuda = f"cuda {self._cuda[0] * 1000 + self._cuda[1] * 10}"
        _publish(self.path, [*self._head, cuda, *faults, *hangs, *cards])

    def _entry(self, uuid: str) -> _Entry:
        everything = [entry for card in self._cards for entry in (card, *card.slices)]
        return next(entry for entry in everything if entry.uuid == uuid)

    def _new_uuid(self, kind: str) -> str:
        self._made += 1
        return f"{kind}-00000000-0000-0000-0000-{self._made:012d}"
