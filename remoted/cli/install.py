"""install, uninstall: the system's daemon on a host with systemd. Root's own files in root's own places, and nothing else.

    /opt/remoted, its folder, units, /usr/local/bin/remotectl    an edition (``editions``)
    /etc/remoted/config.toml                                     with comments; an existing one is kept

An install over another one is an upgrade: running jobs and warm workers go on over it, as over any restart. What ends them, an
uninstall, asks first.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import unquote, urlsplit

import click

import remoted
from remoted.cli import configuration, editions, transport
from remoted.cli.editions import Edition
from remoted.cli.ending import CliError
from remoted.cli.text import print_json
from remoted.errors import StartupError
from remoted.paths import system_paths
from remoted.trust import require_trusted

CONFIG = Path("/etc/remoted/config.toml")
STATE = Path("/var/lib/remoted")
_SLICES = ("remoted-workers.slice", "remoted.slice")
#: For the daemon to say what runs; one that does not run is started by the question.
_ANSWER_SECONDS = 20.0
_SYSTEM_PYTHON = "/usr/bin/python3"
_OLDEST = (3, 11)
_CONFIG_HEAD = (
    "# The system's remoted. Every value below is the default, and is turned on by taking its `#` away. `remotectl config check FILE` reads a file without using it.",
    "# After a change: systemctl reload remoted (a mistake makes it fail); what that cannot change is named in the log (then: restart; running jobs go on).",
    "",
)


@click.command()
@click.option("--source", help="What to install: a folder, a wheel or a requirement; by default what this command was installed from.")
@click.option("--start/--no-start", default=True, help="Enable and start the daemon.", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print documents with stable keys.")
def install(source: str | None, start: bool, as_json: bool) -> int:
    """Install the system's daemon for everybody on this host (root, systemd)."""
    _require_root("install")
    if sys.stderr.isatty():
        print("remotectl: making the daemon's environment, which takes some seconds ...", file=sys.stderr, flush=True)
    _report(_install(source or _own_source(), start), as_json)
    return 0


@click.command()
@click.option("--purge", is_flag=True, help="Remove configuration, queue and results too.")
@click.option("--yes", is_flag=True, help="End running jobs without asking.")
@click.option("--json", "as_json", is_flag=True, help="Print documents with stable keys.")
def uninstall(purge: bool, yes: bool, as_json: bool) -> int:
    """Take the system's daemon away again; running jobs end, after a question. Queue, results and configuration stay."""
    _require_root("uninstall")
    if not yes and (running := _running()):
        _require_consent(running)
    _report(_uninstall(purge), as_json)
    return 0


def _report(steps: Iterator[str], as_json: bool) -> None:
    done = []
    for step in steps:
        done.append(step)
        if not as_json:
            print(step, flush=True)
    if as_json:
        print_json({"done": done})


def _install(source: str, start: bool) -> Iterator[str]:
    os.umask(0o022)
    for folder in editions.remove_unused():
        yield f"removed {folder}, which an interrupted installation had left"
    python = _find_python()
    edition = editions.make(python, _uv(), requirement(source))
    try:
        _require_own(edition.folder / "bin" / "python")
        edition.require_knows(system_paths(Path("/")).database)
        edition.require_starts()
    except CliError:
        shutil.rmtree(edition.folder)
        raise
    yield f"{edition.folder}: remoted {edition.version} on {python}"
    before = editions.in_force()
    changed = list(edition.put_in_force())
    yield from map(str, changed)
    if not CONFIG.exists():
        CONFIG.parent.mkdir(exist_ok=True)
        CONFIG.write_text("\n".join((*_CONFIG_HEAD, *configuration.defaults(is_shared=True, off=True), "")), encoding="utf-8")
        yield f"{CONFIG}"
    yield f"{editions.LINK} -> {editions.PREFIX / 'bin' / 'remotectl'}"
    if start:
        _start_or_go_back(edition, before, changed)
        edition.remove_others()
        was = f" (before: {before.version})" if before else ""
        yield f"remoted.service runs, remoted {edition.version}{was}: users call it with its client of the same version (`pip install` of the folder that this came from); `remotectl doctor` says what is right and wrong here"


def _start_or_go_back(edition: Edition, before: Edition | None, changed: list[Path]) -> None:
    """One that does not start is not left in force where there is another. Raises CliError."""
    try:
        _start(changed)
    except CliError as error:
        if before is None:
            raise
        _start(list(before.put_in_force()))
        shutil.rmtree(edition.folder)
        raise CliError(f"{error}\nremoted {before.version} is in force again, and runs") from None


def _start(changed: list[Path]) -> None:
    """The sockets stay open where they can: who connects meanwhile waits. Raises CliError with the daemon's own words."""
    sockets = "restart" if editions.UNITS / "remoted.socket" in changed else "start"
    editions.run("systemctl", "enable", "--quiet", "remoted.socket", "remoted.service")
    editions.run("systemctl", sockets, "remoted.socket")
    try:
        editions.run("systemctl", "restart", "remoted.service")
    except CliError as error:
        said = subprocess.run(["journalctl", "--unit=remoted.service", "SYSLOG_IDENTIFIER=remoted", "--output=cat", "--lines=1"], capture_output=True, text=True, check=False)
        raise CliError(f"cannot start the daemon: {said.stdout.strip()[-2000:] or error}") from None


def _running() -> str:
    """What an uninstall would end, in words; "" if nothing runs."""
    os.environ["REMOTED_SOCKET"] = transport.SYSTEM_DIRECTORY
    try:
        users = [user["running"] for user in transport.get("/v1/users", timeout=_ANSWER_SECONDS)["users"] if user["running"]]
    except CliError:  # whatever ails it, what it started is there to be seen
        scopes = subprocess.run(["systemctl", "list-units", "--no-legend", "--state=running", "remoted-w*.scope"], capture_output=True, text=True, check=False)
        count = len(scopes.stdout.splitlines())
        return f"{_count(count, 'worker')} of a daemon that does not answer {_run(count)}" if count else ""
    return f"{_count(sum(users), 'job')} of {_count(len(users), 'user')} {_run(sum(users))}" if users else ""


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"


def _run(number: int) -> str:
    return "runs" if number == 1 else "run"


def _require_consent(running: str) -> None:
    """Raises CliError without it."""
    if not sys.stdin.isatty():
        raise CliError(f"cannot uninstall: {running}; `--yes` ends that, `remotectl drain --wait` before it lets it finish")
    if not click.confirm(f"{running}; end {'it' if running.startswith('1 ') else 'them'}?", err=True):
        raise CliError("nothing was uninstalled; `remotectl drain --wait` lets what runs finish")


def _uninstall(purge: bool) -> Iterator[str]:
    was_there = (editions.UNITS / "remoted.service").exists()
    for verb in (("disable", "--quiet", "--now", "remoted.service", "remoted.socket"), ("stop", *_SLICES)):
        subprocess.run(["systemctl", *verb], check=False, capture_output=True)
    if was_there:
        yield "remoted.service is stopped, and so are its workers"
    removed = list(editions.remove_all())
    yield from (f"removed {path}" for path in removed)
    if not removed:
        yield "the system's daemon is not installed"
    editions.run("systemctl", "daemon-reload")
    subprocess.run(["systemctl", "reset-failed", "remoted*"], check=False, capture_output=True)
    yield from _remove([Path(transport.SYSTEM_DIRECTORY), *((CONFIG.parent, STATE) if purge else ())])
    if kept := [os.fspath(path) for path in (CONFIG.parent, STATE) if path.exists()]:
        yield f"kept {' and '.join(kept)}, which an installation finds again; to remove them too: rm -r {' '.join(kept)}"


def _remove(folders: list[Path]) -> Iterator[str]:
    for folder in folders:
        if folder.exists():
            shutil.rmtree(folder, ignore_errors=True)
            yield f"removed {folder}"


def _require_root(verb: str) -> None:
    if os.geteuid() != 0:
        raise CliError(f"cannot {verb}: only root may; run: sudo {shutil.which('remotectl') or 'remotectl'} {verb}")
    if not Path("/run/systemd/system").is_dir():
        raise CliError(f"cannot {verb}: this host does not run systemd; `remoted --system` serves everybody without it")


def _find_python() -> str:
    """An interpreter that is root's and everybody's to execute: users' environments are built by it too."""
    for candidate in (os.path.realpath(getattr(sys, "_base_executable", sys.executable)), _SYSTEM_PYTHON):
        if _is_everybodys(candidate) and _version_of(candidate) >= _OLDEST:
            return candidate
    raise CliError(f"cannot install: no Python {'.'.join(map(str, _OLDEST))} or newer that belongs to root and that everybody may execute; run: apt-get install python3 python3-venv")


def _is_everybodys(program: str) -> bool:
    try:
        require_trusted([program])
        return all(os.stat(part).st_mode & 0o001 for part in (Path(program), *Path(os.path.realpath(program)).parents))
    except (StartupError, OSError):
        return False


def _version_of(program: str) -> tuple[int, int]:
    done = subprocess.run([program, "-I", "-c", "import json, sys, venv; print(json.dumps(sys.version_info[:2]))"], capture_output=True, text=True, check=False)
    major, minor = json.loads(done.stdout) if done.returncode == 0 else (0, 0)
    return major, minor


def _require_own(path: Path) -> None:
    try:
        require_trusted([path])
    except StartupError as error:
        raise CliError(f"cannot install: {error}") from None


def _own_source() -> str:
    """What pip was given for this very installation; the released version if it came from an index."""
    text = metadata.distribution("remoted").read_text("direct_url.json")
    return source_of(json.loads(text)["url"]) if text is not None else f"remoted=={remoted.__version__}"


def source_of(url: str) -> str:
    """As PEP 610 has it: a folder or file that is still there, or something in the net. Raises CliError."""
    parts = urlsplit(url)
    if parts.scheme != "file":
        return f"remoted @ {url}"
    if not Path(path := unquote(parts.path)).exists():
        raise CliError(f"cannot install: {path}, from which this remotectl was installed, is not there any more; say where remoted is: `remotectl install --source FOLDER` (or a wheel)")
    return path


def requirement(source: str) -> str:
    """For the installer: with what the daemon needs. Raises CliError."""
    if Path(source).exists():
        return f"remoted[daemon] @ {Path(source).resolve().as_uri()}"
    if "://" not in source and (os.sep in source or source.endswith(".whl")):
        raise CliError(f"cannot install from {source}: there is no such file or folder")
    return source.replace("remoted", "remoted[daemon]", 1)


def _uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    found = os.fspath(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        raise CliError("cannot install: uv is not found; run: pip install 'remoted[daemon]' for the Python of this remotectl")
    return found

