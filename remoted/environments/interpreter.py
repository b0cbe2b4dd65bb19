"""A caller's interpreter as facts: what it is, where its packages lie, which versions it has.

The interpreter is asked once and asked again only after one of its *stamps* changed: the executable and its site
folders, whose modification times change with every install and uninstall. Comparing stamps takes microseconds.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from remoted.environments.request import EnvironmentFailed, normalise_name
from remoted.environments.running import HelperRunner
from remoted.errors import SpawnError

#: A cold interpreter on a slow disk with hundreds of packages; normally 0.2 s.
_PROBE_SECONDS = 60.0
_ANSWER_BYTES = 32 << 20

#: path -> [device, inode, modification time in ns]; empty for what does not exist.
Stamps = dict[str, list[int]]


@dataclass(frozen=True, slots=True)
class Package:
    """One installed distribution; ``name`` in the one spelling, ``requires`` as its metadata has it."""

    name: str
    version: str
    requires: tuple[str, ...]
    extras: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Interpreter:
    """``base`` is the interpreter outside of any venv; ``site_folders`` are the caller's own, in their order."""

    executable: str
    base: str
    version: str
    implementation: str
    prefix: str
    site_folders: tuple[str, ...]
    packages: tuple[Package, ...]
    stamps: Stamps

    @property
    def identity(self) -> list[str]:
        return [os.path.realpath(self.base), self.version, self.implementation]


def stamps_of(paths: Iterable[str]) -> Stamps:
    """The present stamps of ``paths``; never raises."""
    return {path: _stamp(path) for path in paths}


def _stamp(path: str) -> list[int]:
    try:
        found = os.stat(path)
    except OSError:
        return []
    return [found.st_dev, found.st_ino, found.st_mtime_ns]


async def ask(executable: str, environ: Mapping[str, str], run: HelperRunner, on_output: Callable[[bytes], None]) -> Interpreter:
    """Ask the interpreter. Raises EnvironmentFailed when it cannot answer; what it prints besides goes to ``on_output``."""
    word = secrets.token_hex(16)
    answer = bytearray()
    before = stamps_of([executable])
    script = Path(__file__).with_name("probe.py").read_text(encoding="utf-8")
    try:
        status = await run((executable, "-c", script, word), environ, _bounded(answer), _PROBE_SECONDS)
    except (SpawnError, TimeoutError) as error:
        raise EnvironmentFailed(f"cannot ask the interpreter {executable} what it has: {error}; is it still there?") from error
    _, found, line = bytes(answer).rpartition(word.encode())
    if status.code != 0 or not found:
        on_output(bytes(answer))
        raise EnvironmentFailed(f"cannot ask the interpreter {executable} what it has: it {status.describe()}; see the log", _text(answer))
    try:
        return _read(executable, json.loads(line.splitlines()[0]), before)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise EnvironmentFailed(f"cannot ask the interpreter {executable} what it has: its answer is garbled", _text(answer)) from error


def _bounded(answer: bytearray) -> Callable[[bytes], None]:
    def keep(data: bytes) -> None:
        answer.extend(data[: max(0, _ANSWER_BYTES - len(answer))])

    return keep


def _text(data: bytes | bytearray) -> str:
    return bytes(data[-(64 << 10) :]).decode(errors="replace")


def _read(executable: str, document: dict[str, Any], stamps: Stamps) -> Interpreter:
    return Interpreter(
        executable=executable,
        base=document["base"],
        version=document["version"],
        implementation=document["implementation"],
        prefix=document["prefix"],
        site_folders=tuple(document["stamps"]),
        packages=tuple(_package(item) for item in document["packages"]),
        stamps={**stamps, **document["stamps"]},
    )


def _package(item: dict[str, Any]) -> Package:
    return Package(normalise_name(item["name"]), item["version"], tuple(item["requires"]), tuple(item["extras"]))
