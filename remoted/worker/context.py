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

    @contextlib.contextmanager
    def applied(self, own: dict[str, str]) -> Iterator[None]:
        """Inside: the caller's surroundings, with the worker's own variables over them. After: as before."""
        before = dict(os.environ)
        path, argv, umask = list(sys.path), list(sys.argv), os.umask(self.umask)
        _replace_environ({**self.environ, **own})
        sys.path[:] = self.sys_path + [entry for entry in path if entry not in self.sys_path]
        sys.argv[:] = self.argv
        # The folder may have been removed, or be closed to this process: the call then runs where it is.
        with contextlib.suppress(OSError):
            os.chdir(self.cwd)
        try:
            yield
        finally:
            _replace_environ(before)
            sys.path[:], sys.argv[:] = path, argv
            os.umask(umask)


def _replace_environ(wanted: dict[str, str]) -> None:
    for name in set(os.environ) - set(wanted):
        del os.environ[name]
    for name, value in wanted.items():
        if os.environ.get(name) != value:
            os.environ[name] = value
