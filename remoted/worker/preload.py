"""What a fork server imports before it forks, and whether it may fork after that.

A process may be forked when nothing in it is lost by that: one thread, no process below it, no CUDA context. Pools of
threads that know about fork (OpenBLAS) end theirs in a handler of their own and make new ones when they are next used, so
the threads are counted after a first fork for trial: whoever is left then does not know.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import sys
import threading
from collections.abc import Iterable
from pathlib import Path

from remoted_client.codec.modules import is_project_file

#: Ours: the same text in the worker, whatever folder it comes from.
_OWN = frozenset(("remoted", "remoted_client", "remoted_worker", "cloudpickle"))
_CUDA_DEVICES = "/dev/nvidia"


class Unfit(Exception):
    """This process cannot be forked, or should not be; the message says why, for ``remotectl workers``."""


class Preload:
    """The modules of one fork server, as their files were when they were read."""

    def __init__(self) -> None:
        self._stamps: dict[str, tuple[int, int]] = {}

    def load(self, modules: Iterable[str], hints: Iterable[str]) -> None:
        """Import, check, get ready. Raises Unfit. Hints are guesses: one that cannot be imported is left out."""
        before, files = set(sys.modules), _open_files()
        for name in hints:
            with contextlib.suppress(BaseException):
                importlib.import_module(name)
        for name in modules:
            try:
                importlib.import_module(name)
            except BaseException as error:
                raise Unfit(f"cannot import {name}: {type(error).__name__}: {error}") from error
        _refuse_projects(set(sys.modules) - before)
        _refuse_opened(_open_files() - files)
        _check_forkable()
        self._stamps = {file: _stamp(file) for file in {sys.executable, *_files()}}
        if len(sys.modules) > len(before):
            gc.collect()
        gc.freeze()  # else a collection in a worker would write to, and so copy, every page that is shared

    def changed(self) -> str:
        """A file of what was imported that has changed since, or "": what is installed now is what workers must run."""
        return next((file for file, stamp in self._stamps.items() if _stamp(file) != stamp), "")


def _refuse_opened(files: set[str]) -> None:
    for path in sorted(files):
        if path.startswith(_CUDA_DEVICES):
            raise Unfit(f"the imports opened {path}: CUDA does not survive a fork")
        if path.startswith("socket:"):
            raise Unfit("the imports opened a connection, which the workers would share")


def _check_forkable() -> None:
    if len(sys._current_frames()) > 1:
        names = ", ".join(thread.name for thread in threading.enumerate() if thread is not threading.main_thread())
        raise Unfit(f"the imports started a thread ({names or 'unnamed'}), which a fork would lose")
    if _has_children():
        raise Unfit("the imports started a process, which the workers would share")
    _fork_for_trial()
    if len(left := _tasks()) > 1:
        raise Unfit(f"the imports started threads that do not end before a fork ({', '.join(sorted(set(left)))})")


def _refuse_projects(names: set[str]) -> None:
    """A module that its user edits must be read by each worker itself (F17)."""
    for name in sorted(names):
        file = getattr(sys.modules.get(name), "__file__", None)
        if isinstance(file, str) and is_project_file(file) and os.path.isfile(file) and name.partition(".")[0] not in _OWN:
            raise Unfit(f"{name} is a module of your project ({file}): it would be run as it was, not as you edit it; preload takes installed modules")


def _has_children() -> bool:
    try:
        os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    except ChildProcessError:
        return False
    return True


def _open_files() -> set[str]:
    found = set()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the folder's own descriptor
            found.add(os.readlink(f"/proc/self/fd/{name}"))
    return found


def _fork_for_trial() -> None:
    pid = os.fork()
    if not pid:
        os._exit(0)
    os.waitpid(pid, 0)


def _tasks() -> list[str]:
    return [Path(f"/proc/self/task/{task}/comm").read_text(encoding="utf-8", errors="replace").strip() for task in os.listdir("/proc/self/task")]


def _files() -> list[str]:
    files = (getattr(module, "__file__", None) for module in list(sys.modules.values()))
    return [file for file in files if isinstance(file, str) and os.path.exists(file)]


def _stamp(file: str) -> tuple[int, int]:
    try:
        found = os.stat(file)
    except OSError:
        return 0, -1
    return found.st_mtime_ns, found.st_size
