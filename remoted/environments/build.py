"""One build: resolve against the caller's versions, make a venv, install what the caller lacks, point to the caller.

An environment ends up with its own packages first and the caller's site folders behind them. What the solution
shares with the caller is not installed: it is the same version, and it is found behind.
"""

from __future__ import annotations

import asyncio
import re
from dataclasses import dataclass
from pathlib import Path

from remoted.environments import callers
from remoted.environments.installer import Installer, Log, UvFailed
from remoted.environments.interpreter import Interpreter, Package
from remoted.environments.request import EnvironmentFailed, digest_of, normalise_name
from remoted.environments.shelf import Built, Shelf

#: The name sorts behind the .pth files of packages: the caller's folders come after whatever those add.
_PATH_FILE = "zzz-remoted-caller.pth"


@dataclass(frozen=True, slots=True)
class Order:
    """What shall be built, with everything that may change the answer. ``pinned``: empty when isolated."""

    uid: int
    requirements: tuple[str, ...]
    interpreter: Interpreter
    isolated: bool
    pinned: dict[str, Package]

    @property
    def family(self) -> str:
        """All but the caller's versions. The site folders are in it: the environment points to them."""
        behind = None if self.isolated else self.interpreter.site_folders
        return digest_of([self.uid, self.requirements, self.interpreter.identity, behind])

    @property
    def versions(self) -> dict[str, str]:
        return {name: package.version for name, package in self.pinned.items()}

    def key(self, shared: dict[str, str]) -> str:
        return digest_of([self.family, shared])

    def failure(self, reason: str, log: Log) -> EnvironmentFailed:
        wanted = ", ".join(self.requirements)
        shown = wanted if len(wanted) <= 300 else wanted[:300] + "..."
        return EnvironmentFailed(f"cannot build the environment for {shown}: {reason}", log.text())


async def build(order: Order, installer: Installer, shelf: Shelf, log: Log) -> Built:
    """Raises EnvironmentFailed; then, as after a cancellation, nothing is left of the attempt."""
    scratch = shelf.scratch()
    try:
        packages = await _resolve(order, installer, scratch, log)
        shared = {name: version for name, version in order.versions.items() if name in packages}
        key = order.key(shared)
        built = Built(key, order.family, shelf.new_folder(key), order.requirements, {**packages, **shared}, shared)
        await _fill(order, built, installer, shelf, scratch / "install.txt", log)
        return built
    finally:
        await asyncio.shield(asyncio.to_thread(shelf.discard, scratch))


async def _resolve(order: Order, installer: Installer, scratch: Path, log: Log) -> dict[str, str]:
    wanted, solution = scratch / "requirements.txt", scratch / "solution.txt"
    wanted.write_text("".join(f"{line}\n" for line in order.requirements), encoding="utf-8")
    caller = await asyncio.to_thread(callers.describe, list(order.pinned.values()), scratch) if order.pinned else None
    try:
        await installer.resolve(order.interpreter.base, wanted, solution, caller)
    except UvFailed as error:
        alone = bool(order.pinned) and await _resolves_alone(order, installer, wanted, scratch, log)
        raise order.failure(_explain(order, str(error), alone), log) from error
    return _read_solution(solution)


async def _resolves_alone(order: Order, installer: Installer, wanted: Path, scratch: Path, log: Log) -> bool:
    """Is it the caller's own packages that forbid it? Asked only after a failure, to say the truth about the way out."""
    log.write(b"remoted: resolving once more without your own packages, to see whether they are the reason\n")
    try:
        await installer.resolve(order.interpreter.base, wanted, scratch / "alone.txt", None)
    except UvFailed:
        return False
    return True


def _explain(order: Order, reason: str, alone: bool) -> str:
    named = [f"{name} {version}" for name, version in order.versions.items() if _names(reason, f"{name}=={version}")]
    own = f" Your own environment ({order.interpreter.prefix}) has {', '.join(named)}." if named else ""
    way_out = " Pass isolated=True to build it without your own packages, or change one of the two." if alone else ""
    conflict = "it conflicts with your own packages: " if alone else ""
    return f"{conflict}{reason}.{own}{way_out}"


def _names(reason: str, pin: str) -> bool:
    return re.search(rf"(?<![\w.-]){re.escape(pin)}(?![\w+-]|\.\w)", reason) is not None


def _read_solution(solution: Path) -> dict[str, str]:
    lines = [line.strip() for line in solution.read_text(encoding="utf-8").splitlines()]
    pairs = [line.partition("==") for line in lines if line and not line.startswith(("#", "-"))]
    return {normalise_name(name.strip()): version.split(";")[0].strip() for name, _, version in pairs}


async def _fill(order: Order, built: Built, installer: Installer, shelf: Shelf, install: Path, log: Log) -> None:
    missing = {name: version for name, version in built.packages.items() if name not in built.shared}
    install.write_text("".join(f"{name}=={version}\n" for name, version in missing.items()), encoding="utf-8")
    try:
        await installer.create(built.folder, order.interpreter.base)
        if missing:
            await installer.install(Path(built.python), install)
        if not order.isolated:
            _point_to_caller(built.folder, order.interpreter.site_folders)
        shelf.complete(built)
    except BaseException as error:
        await asyncio.shield(asyncio.to_thread(shelf.discard, built.folder))
        if isinstance(error, UvFailed):
            raise order.failure(f"{error}.", log) from error
        raise


def _point_to_caller(folder: Path, site_folders: tuple[str, ...]) -> None:
    """``addsitedir`` and not bare paths: the .pth files of the caller's editable installs shall work too."""
    own = next(iter(sorted(folder.glob("lib/*/site-packages"))))
    # ASCII: before Python 3.13 the encoding of a .pth file is that of the locale. ``map``: the line runs inside a
    # function of site.py, where a comprehension would not see the import before it.
    line = f"import site; list(map(site.addsitedir, {list(site_folders)!a}))\n"
    (own / _PATH_FILE).write_text(line, encoding="ascii")
