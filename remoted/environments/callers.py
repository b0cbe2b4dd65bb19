"""The caller's own packages in the eyes of the resolver: pinned, described, never installed again.

For each of them the resolver gets a constraint ``name==version`` and a *stub*: a wheel with the metadata of the
installed package and no code. So a solution that needs NumPy takes the caller's version, whether or not an index
still has it (local builds such as ``2.5.1+cu121``, editable and VCS installs are on none), and nothing that the
caller has is downloaded or stored twice. Stubs live as long as one resolution and are hidden from the install.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from remoted.environments.interpreter import Package

#: Tools that happen to lie in a venv because of how it was made; pinning those would forbid much for nothing.
_UNPINNED = frozenset({"pip", "setuptools", "wheel", "distribute", "uv"})
#: PEP 440 without the free spellings; a distribution's package may have others, which uv would refuse to read.
_VERSION = re.compile(
    r"v?(\d+!)?\d+(\.\d+)*((a|b|c|rc|alpha|beta|pre)\d*)?([._-]?(post|rev|r)\d*)?([._-]?dev\d*)?(\+[a-z0-9]+([._-][a-z0-9]+)*)?",
    re.IGNORECASE,
)
_NAME = re.compile(r"[a-z0-9]([a-z0-9-]*[a-z0-9])?")
_DIRECT = re.compile(r"^(\s*[A-Za-z0-9._-]+\s*(?:\[[^\]]*\])?)\s*@\s*[^\s;]+\s*(;.*)?$")


@dataclass(frozen=True, slots=True)
class CallerFiles:
    """What the resolver reads: a file of constraints and a folder of stubs."""

    constraints: Path
    stubs: Path


def pinned(packages: Iterable[Package]) -> dict[str, Package]:
    """Those of the caller's packages that keep their versions, by name."""
    return {package.name: package for package in packages if _is_readable(package) and package.name not in _UNPINNED}


def _is_readable(package: Package) -> bool:
    """Names and versions become lines and file names below, and metadata may hold anything."""
    return bool(_NAME.fullmatch(package.name) and _VERSION.fullmatch(package.version))


def describe(packages: Sequence[Package], folder: Path) -> CallerFiles:
    """Write the constraints and the stubs into ``folder``."""
    files = CallerFiles(folder / "constraints.txt", folder / "stubs")
    files.constraints.write_text("".join(f"{package.name}=={package.version}\n" for package in packages), encoding="utf-8")
    _write_stubs(packages, files.stubs)
    return files


def _write_stubs(packages: Sequence[Package], folder: Path) -> None:
    folder.mkdir()
    for package in packages:
        stem = f"{package.name.replace('-', '_')}-{package.version.replace('-', '_')}"
        with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"{stem}.dist-info/METADATA", _metadata(package))
            wheel.writestr(f"{stem}.dist-info/WHEEL", "Wheel-Version: 1.0\nGenerator: remoted\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
            wheel.writestr(f"{stem}.dist-info/RECORD", "")


def _metadata(package: Package) -> str:
    lines = ["Metadata-Version: 2.1", f"Name: {package.name}", f"Version: {package.version}"]
    lines += [f"Provides-Extra: {extra}" for extra in package.extras if extra.isprintable()]
    lines += [f"Requires-Dist: {_without_url(' '.join(text.split()))}" for text in package.requires]
    return "\n".join(lines) + "\n"


def _without_url(requirement: str) -> str:
    """A resolver refuses a URL inside a package; the constraint pins what it led to anyway."""
    found = _DIRECT.match(requirement)
    return f"{found[1].strip()} {found[2] or ''}".strip() if found else requirement
