"""Where the system's daemon is installed: for each install a folder of its own, and a link to the one in force.

    /opt/remoted-5k2xq0a1        an environment, made whole before anything that runs is touched
    /opt/remoted                 a link to it
    /etc/systemd/system/...      its units; the service runs from the folder itself, not through the link

So what runs keeps the files that it was started from while the next edition is made, and a next one that does not
start leaves the one before as it was.
"""

from __future__ import annotations

import fcntl
import json
import os
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from remoted.cli.ending import CliError
from remoted.lasting import MADE
from remoted.lasting import PREFIX as PREFIX

UNITS = Path("/etc/systemd/system")
LINK = Path("/usr/local/bin/remotectl")
NAMES = ("remoted.service", "remoted.socket", "remoted-workers.slice")
_SHIPPED = Path("share/remoted/systemd/system")
#: The whole daemon is imported: what cannot be loaded here is found out before anything is changed.
_ASK = "import json, remoted.app, remoted.store; print(json.dumps([remoted.__version__, remoted.store.SCHEMA_VERSION]))"
#: "user version" in the header of a database (sqlite.org/fileformat2.html); the daemon that runs has the file for itself.
_SCHEMA_AT, _SCHEMA_BYTES = 60, 4


@dataclass(frozen=True, slots=True)
class Edition:
    """One that is complete."""

    folder: Path
    version: str
    #: The newest schema of the database that it knows.
    schema: int

    def require_knows(self, database: Path) -> None:
        """A database is never changed back (T52). Raises CliError."""
        found = _schema_of(database)
        if found > self.schema:
            raise CliError(f"cannot install remoted {self.version}: the queue in {database} was written by a newer remoted (schema {found}, this one knows {self.schema}); install that or a newer one, or move the file away and start with an empty queue")

    def require_starts(self) -> None:
        """With the configuration that lies there. Raises CliError with the daemon's own words."""
        done = subprocess.run([os.fspath(self.folder / "bin/python"), "-I", "-m", "remoted", "--system", "--check"], capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise CliError(f"cannot install remoted {self.version}: it would not start: {done.stderr.strip().removeprefix('remoted: ')[-2000:]}")

    def put_in_force(self) -> Iterator[Path]:
        """Links and units; what runs goes on until it is restarted. Which files are different from before."""
        _point(PREFIX, self.folder)
        _point(LINK, PREFIX / "bin" / "remotectl")
        for name in NAMES:
            text = (self.folder / _SHIPPED / name).read_text(encoding="utf-8").replace(f"{PREFIX}/bin/", f"{self.folder}/bin/")
            target = UNITS / name
            if not target.exists() or target.read_text(encoding="utf-8") != text:
                target.write_text(text, encoding="utf-8")
                yield target
        run("systemctl", "daemon-reload")

    def remove_others(self) -> None:
        """Nothing runs from them any more."""
        for folder in _folders(PREFIX):
            if folder != self.folder and not _is_being_made(folder):
                shutil.rmtree(folder)


def remove_unused(prefix: Path = PREFIX, units: Path = UNITS) -> Iterator[Path]:
    """What interrupted installations left: no link and no unit names it, no daemon runs from it, and nobody makes it now."""
    unit = units / "remoted.service"
    words = (unit.read_text(encoding="utf-8") if unit.exists() else "") + _daemons_command()
    for folder in _folders(prefix):
        if folder != prefix.resolve() and f"{folder}/" not in words and not _is_being_made(folder):
            shutil.rmtree(folder)
            yield folder


def _daemons_command() -> str:
    """It may run from an edition that has been replaced and is in force until the next restart."""
    try:
        shown = subprocess.run(["systemctl", "show", "--property=MainPID", "--value", "remoted.service"], capture_output=True, text=True, check=False)
        return Path(f"/proc/{int(shown.stdout)}/cmdline").read_text(encoding="utf-8", errors="replace")
    except (OSError, ValueError):
        return ""


def _claim(folder: Path) -> None:
    """It is being made for as long as this process lives."""
    fcntl.flock(os.open(folder, os.O_RDONLY | os.O_CLOEXEC), fcntl.LOCK_EX)


def _is_being_made(folder: Path) -> bool:
    """By another process."""
    file = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(file)
    return False


def make(python: str, uv: str, requirement: str) -> Edition:
    """A new one beside what is there. Raises CliError, and leaves nothing then."""
    if os.statvfs(PREFIX.parent).f_flag & os.ST_NOEXEC:
        raise CliError(f"cannot install: nothing in {PREFIX.parent} may be executed, as it is mounted (noexec); run: mount -o remount,exec {PREFIX.parent}, and change it in /etc/fstab")
    folder = Path(tempfile.mkdtemp(prefix=f"{PREFIX.name}-", dir=PREFIX.parent))
    try:
        _claim(folder)
        folder.chmod(0o755)
        run(python, "-m", "venv", "--without-pip", os.fspath(folder))
        _fill(folder, uv, requirement)
        require_remoted(folder, requirement)
        return _read_new(folder)
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise


def _fill(folder: Path, uv: str, requirement: str) -> None:
    """Without a cache: `sudo -E` keeps HOME, and root's files in a user's cache would end every build of theirs."""
    try:
        run(uv, "pip", "install", "--quiet", "--no-cache", "--python", os.fspath(folder / "bin/python"), requirement, env=dict(os.environ))
    except CliError as error:
        advice = "\nproxies, certificates and indexes that are variables of yours are forgotten by sudo; `sudo -E` keeps them" if "SUDO_USER" in os.environ else ""
        raise CliError(f"{error}{advice}") from None


def require_remoted(folder: Path, requirement: str) -> None:
    """Was it remoted that was asked for? Raises CliError."""
    if not [*folder.glob("lib/python3*/site-packages/remoted/__main__.py")]:
        raise CliError(f"cannot install: there is no remoted in {requirement.replace('remoted[daemon] @ ', '')}; give --source its folder or a wheel of it")


def in_force() -> Edition | None:
    """The one that the link names. One of before there were links is moved aside, to where it can be found again."""
    if PREFIX.is_dir() and not PREFIX.is_symlink():
        aside = Path(tempfile.mkdtemp(prefix=f"{PREFIX.name}-", dir=PREFIX.parent))
        PREFIX.rename(aside)
        PREFIX.symlink_to(aside)
    try:
        return _read(PREFIX.resolve(strict=True))
    except (OSError, CliError):
        return None


def remove_all(prefix: Path = PREFIX, units: Path = UNITS, link: Path = LINK) -> Iterator[Path]:
    """Links, units and folders, as far as there are any."""
    for path in [*(units / name for name in NAMES), link, prefix, *_folders(prefix)]:
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif os.path.lexists(path):
            path.unlink()
        else:
            continue
        yield path


def run(*command: str, env: dict[str, str] | None = None) -> str:
    """What it printed. Raises CliError with what the program said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode != 0:
        raise CliError(f"cannot go on: {' '.join(command[:3])} said: {(done.stderr or done.stdout).strip()[-2000:]}")
    return done.stdout


def _read(folder: Path) -> Edition:
    version, schema = json.loads(run(os.fspath(folder / "bin/python"), "-I", "-c", _ASK))
    return Edition(folder, version, schema)


def _read_new(folder: Path) -> Edition:
    """Raises CliError with the last line of what Python says, which is the reason."""
    try:
        return _read(folder)
    except CliError as error:
        raise CliError(f"cannot install: what was made in {folder.parent} does not run: {str(error).splitlines()[-1]}") from None


def _folders(prefix: Path) -> list[Path]:
    """Every edition, whole or hardly begun; nothing else that somebody may have called so."""
    named = [path for path in prefix.parent.glob(f"{prefix.name}-*") if MADE.fullmatch(path.name.removeprefix(prefix.name)) and path.is_dir()]
    return [path for path in named if (path / "pyvenv.cfg").exists() or not any(path.iterdir())]


def _point(link: Path, target: Path) -> None:
    """At no moment is there no link."""
    new = link.with_name(f".{link.name}.new")
    new.unlink(missing_ok=True)
    new.symlink_to(target)
    new.rename(link)


def _schema_of(database: Path) -> int:
    try:
        with database.open("rb") as file:
            file.seek(_SCHEMA_AT)
            return int.from_bytes(file.read(_SCHEMA_BYTES), "big")
    except FileNotFoundError:
        return 0
