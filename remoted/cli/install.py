"""install, uninstall: the system's daemon on a host with systemd. Root's own files in root's own places, and nothing else.

    PREFIX (/opt/remoted)            an environment of its own, which nobody else may change
    /etc/systemd/system/remoted*     service, sockets, slice of the workers
    /etc/remoted/config.toml         with comments; an existing one is kept
    /usr/local/bin/remotectl         a link
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
from remoted.cli.ending import CliError
from remoted.cli.text import print_json
from remoted.errors import StartupError
from remoted.trust import require_trusted

PREFIX = Path("/opt/remoted")
UNITS = Path("/etc/systemd/system")
CONFIG = Path("/etc/remoted/config.toml")
LINK = Path("/usr/local/bin/remotectl")
STATE = Path("/var/lib/remoted")
_NAMES = ("remoted.service", "remoted.socket", "remoted-workers.slice")
_SYSTEM_PYTHON = "/usr/bin/python3"
_OLDEST = (3, 11)
_CONFIG = """\
# The system's remoted. Every value below is the default; `remotectl config check FILE` reads a file without using it.
# After a change: systemctl reload remoted; what that cannot change is named in the log (then: restart; running jobs go on).

# cpus = 8                        # how many are lent; by default all

[users]
# allow_root = false              # may root's own functions run, as root?
# allow_unknown_uids = false      # serve uids without an account too?

[workers]
# no_new_privileges = true        # sudo and other setuid programs gain nothing inside of a worker

[gpu]
# nvml_library = "libnvidia-ml.so.1"

[environments]
# wheel_folders = []              # folders with wheels, beside the index
# offline = false                 # use no index at all

[limits]
# queued_jobs_per_uid = 100000
# connections_per_uid = 256
# stored_bytes_per_uid = 10737418240
# worker_memory_bytes = 0         # where a config says nothing; 0 is nine tenths of the host's
# worker_tasks = 8192             # processes and threads of one worker
"""


@click.command()
@click.option("--source", help="What to install: a folder, a wheel or a requirement; by default what this command was installed from.")
@click.option("--start/--no-start", default=True, help="Enable and start the daemon.", show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print documents with stable keys.")
def install(source: str | None, start: bool, as_json: bool) -> int:
    """Install the system's daemon for everybody on this host (root, systemd)."""
    _require_root("install")
    _report(_install(source or _own_source(), start), as_json)
    return 0


@click.command()
@click.option("--purge", is_flag=True, help="Remove configuration, queue and results too.")
@click.option("--json", "as_json", is_flag=True, help="Print documents with stable keys.")
def uninstall(purge: bool, as_json: bool) -> int:
    """Take the system's daemon away again; running jobs end. Queue, results and configuration stay."""
    _require_root("uninstall")
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
    python = _find_python()
    _run(python, "-m", "venv", "--without-pip", "--clear", os.fspath(PREFIX))
    _run(_uv(), "pip", "install", "--quiet", "--python", os.fspath(PREFIX / "bin/python"), _requirement(source), env=dict(os.environ))
    _require_own(PREFIX / "bin" / "python")
    yield f"{PREFIX}: remoted {remoted.__version__} on {python}"
    for name in _NAMES:
        shutil.copyfile(PREFIX / "share/remoted/systemd/system" / name, UNITS / name)
        yield f"{UNITS / name}"
    if not CONFIG.exists():
        CONFIG.parent.mkdir(exist_ok=True)
        CONFIG.write_text(_CONFIG, encoding="utf-8")
        yield f"{CONFIG}"
    LINK.unlink(missing_ok=True)
    LINK.symlink_to(PREFIX / "bin" / "remotectl")
    yield f"{LINK} -> {PREFIX / 'bin' / 'remotectl'}"
    _run("systemctl", "daemon-reload")
    if start:
        _run("systemctl", "enable", "--quiet", "remoted.socket", "remoted.service")
        _run("systemctl", "restart", "remoted.socket", "remoted.service")
        yield "remoted.service runs: users call it with `pip install remoted`; `remotectl doctor` says what is right and wrong here"


def _uninstall(purge: bool) -> Iterator[str]:
    for verb in (("disable", "--quiet", "--now", "remoted.service", "remoted.socket"), ("stop", "remoted-workers.slice")):
        subprocess.run(["systemctl", *verb], check=False, capture_output=True)
    yield "remoted.service is stopped, and so are its workers"
    found = [UNITS / name for name in _NAMES] + [LINK, PREFIX]
    for path in found + ([CONFIG.parent, STATE] if purge else []):
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
        yield f"removed {path}"
    _run("systemctl", "daemon-reload")
    if not purge:
        yield f"kept {CONFIG} and {STATE}: `remotectl uninstall --purge` removes them too"


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
    if text is None:
        return f"remoted=={remoted.__version__}"
    return unquote(urlsplit(json.loads(text)["url"]).path)


def _requirement(source: str) -> str:
    return f"remoted[daemon] @ {Path(source).resolve().as_uri()}" if Path(source).exists() else source.replace("remoted", "remoted[daemon]", 1)


def _uv() -> str:
    beside = Path(sys.executable).with_name("uv")
    found = os.fspath(beside) if beside.exists() else shutil.which("uv")
    if found is None:
        raise CliError("cannot install: uv is not found; run: pip install 'remoted[daemon]' for the Python of this remotectl")
    return found


def _run(*command: str, env: dict[str, str] | None = None) -> None:
    """Raises CliError with what the program said."""
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=env)
    if done.returncode != 0:
        raise CliError(f"cannot go on: {' '.join(command[:3])} said: {(done.stderr or done.stdout).strip()[-2000:]}")
