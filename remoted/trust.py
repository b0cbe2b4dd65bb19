"""Is a path root's alone? The rule of sshd: it and every folder above it, none of them writable by somebody else.

A daemon that runs as root reads its configuration and imports its code from such paths only (T31). A sticky folder
(/tmp) above one is no harm: nobody but root can replace what is root's in it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable
from pathlib import Path

from remoted.errors import StartupError


def closed_to_others(paths: Iterable[str | Path]) -> Path | None:
    """The first of what they link to, and of the folders above either, that not everybody may execute or enter; None if all is open. Raises OSError."""
    reals = {Path(path): Path(os.path.realpath(path)) for path in paths}
    parts = [part for path, real in reals.items() for part in (*path.parents, real, *real.parents)]
    return next((part for part in parts if not part.stat().st_mode & stat.S_IXOTH), None)


def require_trusted(paths: Iterable[str | Path], owner: int = 0) -> None:
    """Raises StartupError naming the first part of a path that somebody else could have made; absent ones are fine."""
    seen: set[Path] = set()
    for path in paths:
        real = Path(os.path.realpath(path))
        for part in (real, *real.parents):
            if part not in seen:
                _require(part, path, owner)
                seen.add(part)


def _require(part: Path, whole: str | Path, owner: int) -> None:
    try:
        found = part.stat()
    except FileNotFoundError:
        return
    if found.st_uid not in (0, owner):
        raise StartupError(f"cannot trust {whole}: {part} belongs to uid {found.st_uid}; give it to root")
    if found.st_mode & 0o022 and not found.st_mode & stat.S_ISVTX:
        raise StartupError(f"cannot trust {whole}: others than its owner may write to {part}; run: chmod go-w {part}")
