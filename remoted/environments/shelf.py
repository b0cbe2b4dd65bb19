"""The built environments on disk, and which request was answered with which.

    <folder>/<key>-<nonce>/              one environment: a venv that never moves
    <folder>/<key>-<nonce>/remoted.json  its *marker*, written last: without it the folder is a leftover
    <folder>/requests/<digest>.json      a request, the environment that answered it, the stamps it was true for
    <folder>/scratch/                    files of running resolutions

The nonce keeps a build apart from a leftover of the same key, into which an installer that survived a killed
daemon may still be writing. The marker's modification time is the last use. One daemon owns the folder.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

_MARKER = "remoted.json"
_REQUESTS = "requests"
_SCRATCH = "scratch"


@dataclass(frozen=True, slots=True)
class Built:
    """A complete environment. ``packages``: name -> version of the whole solution; ``shared``: those of the caller in it."""

    key: str
    family: str
    folder: Path
    requirements: tuple[str, ...]
    packages: dict[str, str]
    shared: dict[str, str]

    @property
    def python(self) -> str:
        return os.fspath(self.folder / "bin" / "python")

    def fits(self, family: str, callers: dict[str, str]) -> bool:
        """Is it the answer for a caller with these versions? Only those that are part of the solution count."""
        return self.family == family and self.shared == {name: callers[name] for name in self.packages if name in callers}


@dataclass(frozen=True, slots=True)
class EnvironmentEntry:
    """One line for people. ``last_used`` in Unix seconds; ``size_bytes`` counts files that uv's cache may share."""

    key: str
    requirements: tuple[str, ...]
    size_bytes: int
    last_used: float


class Shelf:
    """Blocking and quick, but for ``size_bytes`` and ``discard``: those belong into a thread."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def prepare(self) -> None:
        for folder in (self._folder / _REQUESTS, self._folder / _SCRATCH):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    # -- environments --------------------------------------------------------------------------------------

    def new_folder(self, key: str) -> Path:
        return self._folder / f"{key}-{secrets.token_hex(4)}"

    def scratch(self) -> Path:
        self.prepare()
        return Path(tempfile.mkdtemp(dir=self._folder / _SCRATCH))

    def complete(self, built: Built) -> None:
        """Write the marker: from here on the environment exists."""
        facts = {name: getattr(built, name) for name in ("key", "family", "requirements", "packages", "shared")}
        _write(built.folder / _MARKER, facts)

    def all(self) -> list[Built]:
        return [built for folder in self._environments() if (built := self._read(folder)) is not None]

    def find(self, family: str, callers: dict[str, str]) -> Built | None:
        return next((built for built in self.all() if built.fits(family, callers)), None)

    def touch(self, built: Built, now: float) -> bool:
        """Note a use at ``now`` (Unix seconds); False when the environment or its interpreter is gone."""
        try:
            os.utime(built.folder / _MARKER, (now, now))
            os.stat(built.python)
        except OSError:
            return False
        return True

    def last_used(self, built: Built) -> float:
        try:
            return (built.folder / _MARKER).stat().st_mtime
        except OSError:
            return 0.0

    def leftovers(self) -> list[Path]:
        """Folders of builds that were not finished, running ones among them."""
        return [folder for folder in self._environments() if not (folder / _MARKER).exists()]

    def old_scratch(self) -> list[Path]:
        with contextlib.suppress(FileNotFoundError):
            return list((self._folder / _SCRATCH).iterdir())
        return []

    def withdraw(self, folder: Path) -> None:
        """At once no environment any more; its files go with ``discard``."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(folder / _MARKER)

    def discard(self, folder: Path) -> None:
        shutil.rmtree(folder, ignore_errors=True)

    def size_bytes(self, built: Built) -> int:
        total = 0
        for parent, _, names in os.walk(built.folder):
            for name in names:
                with contextlib.suppress(OSError):
                    total += os.lstat(os.path.join(parent, name)).st_size
        return total

    def _environments(self) -> list[Path]:
        try:
            return sorted(path for path in self._folder.iterdir() if path.name not in (_REQUESTS, _SCRATCH))
        except FileNotFoundError:
            return []

    def _read(self, folder: Path) -> Built | None:
        facts = _load(folder / _MARKER)
        if facts is None:
            return None
        built = Built(facts["key"], facts["family"], folder, tuple(facts["requirements"]), facts["packages"], facts["shared"])
        return built if os.path.exists(built.python) else None

    # -- requests ------------------------------------------------------------------------------------------

    def remember(self, digest: str, built: Built, stamps: dict[str, list[int]]) -> None:
        self.prepare()
        _write(self._folder / _REQUESTS / f"{digest}.json", {"folder": built.folder.name, "stamps": stamps})

    def recall(self, digest: str) -> tuple[Built, dict[str, list[int]]] | None:
        facts = _load(self._folder / _REQUESTS / f"{digest}.json")
        built = self._read(self._folder / facts["folder"]) if facts else None
        return (built, facts["stamps"]) if facts and built else None

    def forget_orphaned_requests(self) -> None:
        """Drop the records whose environment is gone."""
        with contextlib.suppress(FileNotFoundError):
            for path in (self._folder / _REQUESTS).iterdir():
                if self.recall(path.stem) is None:
                    path.unlink(missing_ok=True)


def _write(path: Path, facts: dict[str, Any]) -> None:
    """Whole or not at all, also when the daemon is killed in between."""
    temporary = path.with_name(f".{path.name}-{secrets.token_hex(4)}")
    temporary.write_text(json.dumps(facts), encoding="utf-8")
    temporary.replace(path)


def _load(path: Path) -> dict[str, Any] | None:
    """None for a file that is missing or was not written by ``_write`` (a full disk, an editor)."""
    try:
        facts = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) else None
