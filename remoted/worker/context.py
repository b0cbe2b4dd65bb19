"""What comes with each call and is taken away after it: environment, directory, umask, import path.

Some variables are part of what a worker *is* (PATH, CUDA_*, declared ``env=``; MECHANISMS 6): the daemon
starts another worker for other values of those, so they are the same in every call that arrives here.
"""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


class CallContext:
    """The caller's surroundings, as the client described them."""

    def __init__(self, document: dict[str, Any]) -> None:
        self.environ: dict[str, str] = {**document["environ"], **document["declared"]}
        self.cwd: str = document["cwd"]
        self.umask: int = document["umask"]
        self.sys_path: list[str] = document["sys_path"]
        self.argv: list[str] = document["argv"]
        self._wanted: dict[str, str] | None = None
        self._encoded: dict[bytes, bytes] = {}

    @contextlib.contextmanager
    def applied(self, own: dict[str, str]) -> Iterator[None]:
        """Inside: the caller's surroundings, with the worker's own variables over them.

        After: import path, arguments, umask and directory are as before. The environment stays as it is until a
        call needs another one: putting some fifty variables in and out was most of a small call's time. What a body
        did to it is undone at the next call, which compares.
        """
        path, argv, umask = list(sys.path), list(sys.argv), os.umask(self.umask)
        self._set_environ(own)
        sys.path[:] = self.sys_path + [entry for entry in path if entry not in self.sys_path]
        sys.argv[:] = self.argv
        # The folder may have been removed, or be closed to this process: the call then runs where it is.
        with contextlib.suppress(OSError):
            os.chdir(self.cwd)
        try:
            yield
        finally:
            sys.path[:], sys.argv[:] = path, argv
            os.umask(umask)

    def _set_environ(self, own: dict[str, str]) -> None:
        if self._wanted is None:
            self._wanted = {**self.environ, **own}
            self._encoded = {os.fsencode(name): os.fsencode(value) for name, value in self._wanted.items()}
        if getattr(os.environ, "_data", None) != self._encoded:
            _replace_environ(self._wanted)


def _replace_environ(wanted: dict[str, str]) -> None:
    for name in set(os.environ) - set(wanted):
        del os.environ[name]
    for name, value in wanted.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
