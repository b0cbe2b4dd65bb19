"""The name of the system's own interpreter that outlives an upgrade.

Each installation is a folder of its own, and a link names the one in force (``cli/editions.py``). A program from there,
``remotectl``, runs in the folder itself and says so of the calls that it makes; the folder is gone after the next upgrade, while
its jobs wait. So whatever edition a call names, the link is meant. Who executes it has become the caller before, as with
any interpreter that a call names.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

PREFIX = Path("/opt/remoted")
#: The end of an edition's name, by mkdtemp.
MADE = re.compile(r"-[a-z0-9_]{8}")


def lasting(executable: str, *, prefix: Path = PREFIX) -> str:
    """The interpreter through the link, where it is (or was) one of an edition; any other as it is."""
    folder, name = os.path.split(executable)
    edition, place = os.path.split(folder)
    if place != "bin" or not name.startswith("python") or not prefix.is_symlink():
        return executable
    is_ours = edition.startswith(f"{prefix}-") and MADE.fullmatch(edition.removeprefix(str(prefix)))
    return str(prefix / "bin" / "python") if is_ours else executable


def in_force(executable: str, *, prefix: Path = PREFIX) -> str:
    """The opposite, for today: warm workers keep to the edition in which they began, and are of another kind than those of the next."""
    if executable != str(prefix / "bin" / "python"):
        return executable
    return str(Path(os.path.realpath(prefix)) / "bin" / "python")
