"""What comes with each call and is taken away after it: environment, directory, umask, import path.

Some variables are part of what a worker *is* (PATH, CUDA_*, declared ``env=``; MECHANISMS 6): the daemon
starts another worker for other values of those, so they are the same in every call that arrives here.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from remoted_client import context as client_context


class CallContext:
    """The caller's surroundings, as the client described them."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.environ: dict[str, str] = {**document["environ"], **document["declared"]}
        self.cwd: str = document["cwd"]
        self.umask: int = document["umask"]
        self.sys_path: list[str] = document["sys_path"]
        self.argv: list[str] = document["argv"]
        self._values: dict[str, str] = document.get("values", {})
        self._logging: dict[str, Any] | None = document.get("logging")
        #: What ``os.environ`` keeps the environment in, as it is when these are in place: with the very same objects, so that
        #: comparing is a look at each pointer.
        self._environ: dict[Any, Any] | None = None
        self._path: list[str] = []

    def apply(self, own: dict[str, str], base_path: list[str]) -> None:
        """The caller's surroundings, with the worker's own variables and import path behind them.

        They stay until the next call compares and puts back what a body changed: putting some fifty variables in and
        out was most of a small call's time.
        """
        if not self._path:
            self._path = self.sys_path + [entry for entry in base_path if entry not in self.sys_path]
        if self._environ is None or getattr(os.environ, "_data", None) != self._environ:
            self._set_environ(own)
        if self._values:
            client_context.values.update(self._values)
        if self._logging != _Logging.current.applied:
            _Logging.current.apply(self._logging)
        if sys.path != self._path:
            sys.path[:] = self._path
        if sys.argv != self.argv:
            sys.argv[:] = self.argv
        os.umask(self.umask)
        _go_to(self.cwd)

    @contextlib.contextmanager
    def applied(self, own: dict[str, str], base_path: list[str]) -> Iterator[None]:
        """The same for as long as the block runs, inside a body that goes on afterwards."""
        path, argv, umask, cwd = list(sys.path), list(sys.argv), os.umask(0o077), _directory()
        self.apply(own, base_path)
        try:
            yield
        finally:
            sys.path[:], sys.argv[:] = path, argv
            os.umask(umask)
            if cwd:
                _go_to(cwd)

    def _set_environ(self, own: dict[str, str]) -> None:
        replace_environ({**self.environ, **own})
        self._environ = dict(getattr(os.environ, "_data", os.environ))


class _Logging:
    """What the worker has done to the root logger; what bodies do to it themselves is theirs, and stays."""

    current: _Logging

    def __init__(self) -> None:
        self.applied: dict[str, Any] | None = None
        self._handler: logging.Handler | None = None

    def apply(self, wanted: dict[str, Any] | None) -> None:
        """As in the script: a level, and where it prints its records, a handler that does."""
        self.applied = wanted
        root = logging.getLogger()
        if self._handler is not None:
            root.removeHandler(self._handler)
            self._handler = None
        root.setLevel(wanted["level"] if wanted else logging.WARNING)
        for handler in root.handlers[:] if wanted and wanted["format"] is not None else []:
            if _is_implicit(handler):
                root.removeHandler(handler)
        if wanted and wanted["format"] is not None and not root.handlers:
            self._handler = _Standard("stdout" if wanted["stdout"] else "stderr")
            self._handler.setFormatter(logging.Formatter(wanted["format"], wanted["date_format"], wanted["style"]))
            root.addHandler(self._handler)


def _is_implicit(handler: logging.Handler) -> bool:
    """One that ``logging.info()`` itself makes where there is none."""
    return type(handler) is logging.StreamHandler and handler.formatter is not None and handler.formatter._fmt == logging.BASIC_FORMAT


if TYPE_CHECKING:
    _StreamHandler = logging.StreamHandler[Any]
else:
    _StreamHandler = logging.StreamHandler  # takes no parameter before Python 3.11


class _Standard(_StreamHandler):
    """To whatever ``sys.stderr`` is when a record comes: it is put back after bodies that replace it."""

    def __init__(self, stream: str) -> None:
        self._stream = stream
        logging.Handler.__init__(self)

    @property
    def stream(self) -> Any:
        return getattr(sys, self._stream)

    @stream.setter
    def stream(self, value: Any) -> None:
        """Fixed."""


_Logging.current = _Logging()


def _go_to(folder: str) -> None:
    """It may have been removed, or be closed to this process: the call then runs where it is."""
    try:
        if os.getcwd() != folder:  # half as dear as going there again
            os.chdir(folder)
    except OSError:
        return


def _directory() -> str:
    try:
        return os.getcwd()
    except FileNotFoundError:
        return ""


def replace_environ(wanted: dict[str, str]) -> None:
    """``os.environ`` becomes this; what is equal is not touched."""
    for name in set(os.environ) - set(wanted):
        del os.environ[name]
    for name, value in wanted.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
