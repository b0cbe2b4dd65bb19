"""What goes with every call: the caller's environment, directory, umask and import path, as one JSON document.

It is built anew only when something changed; the common case is a comparison.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

from remoted_client import context
from remoted_client.suggest import warn

#: Of this process only: a worker must not believe that it is a shell's child or another worker.
_DROPPED = frozenset({"_", "REMOTED_WORKER_ID", "REMOTED_LOCAL", "PYTEST_CURRENT_TEST", "COLUMNS", "LINES", "OLDPWD", "SHLVL", "NOTIFY_SOCKET", "LISTEN_FDS", "LISTEN_PID"})
_UMASK_SECONDS = 0.005


class _Document(NamedTuple):
    """A document, and what it was made from."""

    #: In one tuple, so that one comparison is enough.
    facts: tuple[Any, ...]
    data: bytes
    digest: str


class Surroundings:
    """The newest document, by what it was made from."""

    def __init__(self) -> None:
        self._known: dict[tuple[tuple[str, str], ...], _Document] = {}
        self._warned: set[str] = set()
        self._umask = _Umask()

    def document(self, declared: dict[str, str | None]) -> tuple[bytes, str]:
        """(JSON, its digest) for a call with these ``env=`` values; None means the caller's own value (F16)."""
        values = self._resolve(declared) if declared else {}
        key = tuple(sorted(values.items())) if values else ()
        known = self._known.get(key)
        cwd, umask, logging = current_directory(), self._umask.read(), logging_settings()
        facts = (cwd, umask, logging, getattr(os.environ, "_data", os.environ), sys.path, sys.argv, context.values)
        if known is not None and known.facts == facts:
            return known.data, known.digest
        data = _encode(dict(os.environ), (cwd, umask, sys.path, sys.argv), values, logging)
        digest = hashlib.sha256(data).hexdigest()
        copies = (dict(_environ()), list(sys.path), list(sys.argv), dict(context.values))
        self._known[key] = _Document((cwd, umask, logging, *copies), data, digest)
        return data, digest

    def _resolve(self, declared: dict[str, str | None]) -> dict[str, str]:
        values: dict[str, str] = {}
        for name, value in declared.items():
            found = os.environ.get(name) if value is None else value
            if found is None:
                self._warn_once(name)
            else:
                values[name] = found
        return values

    def _warn_once(self, name: str) -> None:
        if name not in self._warned:
            self._warned.add(name)
            warn(f"env={{{name!r}: None}} takes the value of your environment, where {name} is not set: it is unset in the worker too")


def logging_settings() -> dict[str, Any] | None:
    """How the script has set up the root logger, as far as a worker can do the same: level, format, date format.

    None for a script that did not, or not with the standard means (then the worker's own is left alone).
    """
    logging = sys.modules.get("logging")
    root = getattr(logging, "root", None)
    if logging is None or root is None or (root.level == logging.WARNING and not root.handlers):
        return None
    found: dict[str, Any] = {"level": root.level, "format": None}
    for handler in root.handlers:
        formatter = handler.formatter or logging._defaultFormatter
        if type(handler) is logging.StreamHandler and type(formatter) is logging.Formatter and isinstance(formatter._fmt, str):
            stdout = handler.stream is sys.stdout
            return {**found, "format": formatter._fmt, "date_format": formatter.datefmt, "style": _style(logging, formatter), "stdout": stdout}
    return found


def _style(logging: Any, formatter: Any) -> str:
    kind = type(formatter._style)
    return "{" if kind is logging.StrFormatStyle else "$" if kind is logging.StringTemplateStyle else "%"


def current_directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return "/"


class _Umask:
    """The process's umask, read without changing it: ``os.umask`` would, for a moment, for every thread.

    That read is half of what a small call costs, so one that is a few milliseconds old will do.
    """

    def __init__(self) -> None:
        self._fd = os.open("/proc/self/status", os.O_RDONLY | os.O_CLOEXEC)
        self._known, self._read_at = 0o077, float("-inf")

    def read(self) -> int:
        now = time.monotonic()
        if now - self._read_at > _UMASK_SECONDS:
            self._known, self._read_at = self._read(), now
        return self._known

    def _read(self) -> int:
        text = os.pread(self._fd, 256, 0)
        start = text.find(b"Umask:")
        return int(text[start + 6 : start + 12].split()[0], 8) if start >= 0 else 0o077

    def __del__(self) -> None:
        os.close(self._fd)


def _environ() -> Mapping[Any, Any]:
    """Something that compares equal while the environment is the same; the mapping itself decodes every value."""
    return getattr(os.environ, "_data", os.environ)


def own_entries(path: list[str], cwd: str) -> list[str]:
    """The script's part of the import path. What the interpreter and its packages add, a worker has by itself.

    The difference matters in a worker with ``dependencies=``: there the environment comes before the caller's
    packages, which this list would put first. A relative entry ("" is the current directory) means something here
    only, so it is made absolute.
    """
    from remoted_client.codec.modules import is_installed

    library = f"python{sys.version_info[0]}{sys.version_info[1]}.zip"
    entries = [os.path.join(cwd, entry) for entry in path if not entry.endswith(library)]
    return [entry for entry in entries if not is_installed(entry)]


def _encode(environ: dict[str, str], facts: tuple[str, int, list[str], list[str]], declared: dict[str, str], logging: dict[str, Any] | None) -> bytes:
    cwd, umask, path, argv = facts
    document = {
        "environ": {name: value for name, value in environ.items() if name not in _DROPPED},
        "declared": declared,
        "values": context.values,
        "logging": logging,
        "cwd": cwd,
        "umask": umask,
        "sys_path": own_entries(path, cwd),
        "argv": argv,
        "descriptors": resource.getrlimit(resource.RLIMIT_NOFILE)[0],
    }
    return json.dumps(document, sort_keys=True).encode("utf-8", "surrogateescape")
