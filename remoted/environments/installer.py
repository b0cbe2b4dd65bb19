"""uv as a program: its command lines, its environment made from nothing, its complaints.

Nothing of a caller's text is ever an argument: requirements go through files. Of the caller's variables only those
come along that say where packages are and how to get there; their values (they may hold passwords) are neither
logged nor kept.
"""

from __future__ import annotations

import asyncio
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path

from remoted.config import EnvironmentSettings
from remoted.environments.callers import CallerFiles
from remoted.environments.running import HelperRunner, HelperStatus
from remoted.errors import SpawnError

#: How much of the output a failure carries.
LOG_BYTES = 64 << 10
_REASON_CHARACTERS = 1000
_DEFAULT_PATH = "/usr/local/bin:/usr/bin:/bin"
_TAKEN = frozenset(
    {"HOME", "PATH", "LANG", "TMPDIR", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "SSL_CERT_FILE", "SSL_CERT_DIR", "REQUESTS_CA_BUNDLE"}
    | {"HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "NO_PROXY", "http_proxy", "https_proxy", "all_proxy", "no_proxy"}
)
_FROM_PIP = {"PIP_INDEX_URL": "UV_INDEX_URL", "PIP_EXTRA_INDEX_URL": "UV_EXTRA_INDEX_URL", "PIP_CERT": "SSL_CERT_FILE"}
#: These move the build to another place or interpreter, add packages or change how uv speaks: the command lines decide that.
_REFUSED = frozenset(
    {"UV_PYTHON", "UV_PYTHON_PREFERENCE", "UV_SYSTEM_PYTHON", "UV_BREAK_SYSTEM_PACKAGES", "UV_MANAGED_PYTHON", "UV_NO_MANAGED_PYTHON"}
    | {"UV_PROJECT", "UV_PROJECT_ENVIRONMENT", "UV_WORKING_DIR", "UV_CONSTRAINT", "UV_OVERRIDE", "UV_EXCLUDE", "UV_REQUIRE_HASHES"}
    | {"UV_VENV_SEED", "UV_VENV_CLEAR", "UV_VENV_RELOCATABLE", "UV_ENV_FILE", "UV_CUSTOM_COMPILE_COMMAND"}
)
#: uv's own default is 50 at once.
_MANY_DOWNLOADS = "128"


def uv_environment(caller: Mapping[str, str], accelerate_downloads: bool) -> dict[str, str]:
    """The variables for uv; of the caller's those about indexes, certificates and proxies."""
    chosen = {_FROM_PIP[name]: value for name, value in caller.items() if name in _FROM_PIP}
    chosen |= {name: value for name, value in caller.items() if name in _TAKEN or (name.startswith("UV_") and name not in _REFUSED)}
    if accelerate_downloads:
        chosen.setdefault("UV_CONCURRENT_DOWNLOADS", _MANY_DOWNLOADS)
    return {"PATH": _DEFAULT_PATH, "HOME": os.path.expanduser("~"), "LANG": "C.UTF-8", **chosen, "UV_NO_PROGRESS": "1"}


class Log:
    """Passes output on and remembers its end."""

    def __init__(self, on_output: Callable[[bytes], None]) -> None:
        self._on_output = on_output
        self._tail = bytearray()

    def write(self, data: bytes) -> None:
        self._tail += data
        del self._tail[:-LOG_BYTES]
        self._on_output(data)

    def text(self) -> str:
        return self._tail.decode(errors="replace")


class UvFailed(Exception):
    """uv said no; the text is its explanation in one line. Never leaves this package."""


class Installer:
    """One build's uv: the same settings, variables, log and deadline for each of its steps."""

    def __init__(self, uv: str, run: HelperRunner, settings: EnvironmentSettings, environ: Mapping[str, str], log: Log) -> None:
        self._uv = uv
        self._run = run
        self._settings = settings
        self._environ = environ
        self._log = log
        self._ends = asyncio.get_running_loop().time() + settings.build_deadline_seconds

    async def create(self, folder: Path, base: str) -> None:
        """An empty venv of the interpreter ``base``. Raises UvFailed."""
        await self._call("venv", "--no-project", "--python", base, os.fspath(folder))

    async def resolve(self, base: str, requirements: Path, solution: Path, caller: CallerFiles | None) -> None:
        """Write ``name==version`` lines into ``solution``; ``caller``: whose versions must be kept. Raises UvFailed."""
        known = ("--constraints", os.fspath(caller.constraints), "--find-links", os.fspath(caller.stubs)) if caller else ()
        form = ("--no-header", "--no-annotate", "--output-file", os.fspath(solution))
        await self._call("pip", "compile", "--python", base, *form, *known, *self._sources(), os.fspath(requirements))

    async def install(self, python: Path, solution: Path) -> None:
        """Exactly the lines of ``solution``. Raises UvFailed."""
        lines = ("--requirements", os.fspath(solution))
        await self._call("pip", "install", "--no-deps", "--python", os.fspath(python), *self._sources(), *lines)

    def _sources(self) -> tuple[str, ...]:
        links = tuple(argument for folder in self._settings.wheel_folders for argument in ("--find-links", folder))
        return (*links, "--no-index") if self._settings.offline else links

    async def _call(self, *arguments: str) -> None:
        general = ("--color", "never", "--no-python-downloads", *(("--offline",) if self._settings.offline else ()))
        output = Log(self._log.write)
        left = self._ends - asyncio.get_running_loop().time()
        try:
            status = await self._run((self._uv, *general, *arguments), self._environ, output.write, max(left, 0.001))
        except TimeoutError:
            limit = self._settings.build_deadline_seconds
            raise UvFailed(f"it took longer than {limit:g} s (build_deadline_seconds of [environments])") from None
        except SpawnError as error:
            raise UvFailed(f"{error}; install uv, or say where it is") from error
        if status.code != 0:
            raise UvFailed(_reason(output.text(), status))


def _reason(output: str, status: HelperStatus) -> str:
    """uv's explanation: from its last "error:" to the next empty line, as one line."""
    found = re.split(r"(?m)^(?:error:|\s*\u00d7)", output)
    body = re.split(r"\n\s*\n|\nhint:", found[-1].strip())[0] if len(found) > 1 else ""
    words = " ".join(re.sub(r"(?m)^\s*(?:cause:|[\u2570\u251c][\u2500]\u25b6|\u2502)", ":", body).split()).replace(" :", ":")
    return words[:_REASON_CHARACTERS].rstrip(".") or f"uv {status.describe()}"
