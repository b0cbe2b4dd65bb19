"""The script's names for processes that a body starts with ``spawn`` or ``forkserver``.

Such a child asks its parent which main module to run again. Running the script again would run its calls again,
so the namespace in the worker has a ``__spec__`` that answers with ``codec.spawned_main``. In that moment the
names that came from the caller are written to a private file, and the child builds its ``__main__`` from it. What
bodies have added since (``global MODEL``) is not in it: a child of an ordinary script would not have it either.
"""

from __future__ import annotations

import atexit
import contextlib
import os
import pickle
import sys
import tempfile
import types
import uuid
from importlib.machinery import ModuleSpec
from typing import TYPE_CHECKING, Any, BinaryIO

from .modules import ModuleSet, install_modules, installed_modules

if TYPE_CHECKING:
    from .namespaces import Home, Namespace

VARIABLE = "REMOTED_SPAWNED_MAIN"
_SPAWNED = f"{__package__}.spawned_main"
#: What the child's own module has, or must keep.
_NOT_COPIED = frozenset(("__name__", "__spec__", "__builtins__", "__loader__", "__cached__", "__package__"))


class MainSpec(ModuleSpec):
    """The spec of a namespace. Only ``multiprocessing`` and ``loky`` read the name of a main module's spec."""

    def __init__(self, home: Home, space: Namespace) -> None:
        self._home, self._space = home, space
        super().__init__(_SPAWNED, None, origin=space.scope.get("__file__"))

    @property
    def name(self) -> str:  # computed when it is asked for
        if sys._getframe(1).f_code.co_name == "get_preparation_data":
            os.environ[VARIABLE] = self._home.main_file.written(self._home, self._space)
        return _SPAWNED

    @name.setter
    def name(self, _: str) -> None:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Fixed."""

    @property
    def parent(self) -> str:
        """The package for relative imports: the script's own."""
        return self._space.scope.get("__package__") or ""


class MainFile:
    """The file of this process, written anew when the namespace has received anything since.

    Its path never changes: a fork server keeps the environment that it was started with.
    """

    def __init__(self) -> None:
        self._content: tuple[Namespace, dict[str, int]] | None = None
        self._path = ""
        self._pid = 0

    def written(self, home: Home, space: Namespace) -> str:
        """The path of the file, up to date for this namespace."""
        if self._pid != os.getpid():
            self._pid, self._content = os.getpid(), None
            self._path = os.path.join(tempfile.gettempdir(), f"remoted-main-{self._pid}-{uuid.uuid4().hex}")
            atexit.register(_remove, self._path, self._pid)
        if self._content != (space, space.versions):
            fd, fresh = tempfile.mkstemp(prefix="remoted-main-")
            with os.fdopen(fd, "wb") as file:
                _write(file, home, space)
            os.replace(fresh, self._path)
            self._content = (space, dict(space.versions))
        return self._path


def restore() -> dict[str, Any]:
    """In the child: the names of the script, from the file that the parent wrote."""
    from .load import Unpickler
    from .namespaces import Home
    from .origin import Origin

    path = os.environ.get(VARIABLE, "")
    if not os.path.exists(path):
        return {}
    home = Home(Origin())
    with open(path, "rb") as file:
        install_modules(ModuleSet.from_bytes(pickle.load(file)))
        reader = Unpickler(file, home)
        ref, count = reader.load()
        for _ in range(count):
            reader.load()
    scope = home.space(ref).scope
    scope["__name__"] = "__mp_main__"
    return {name: value for name, value in scope.items() if name not in _NOT_COPIED}


def _write(file: BinaryIO, home: Home, space: Namespace) -> None:
    from .dump import Pickler

    pickle.dump(installed_modules().to_bytes(), file)
    names = [name for name in space.versions if name in space.scope and _travels(name, home, space)]
    names.sort(key=lambda name: _rank(space.scope[name]))
    pickler = Pickler(file, home.origin, wants=lambda ref, name: name in names)
    pickler.dump((space.ref, len(names)))
    pickler.bind_all([(space.scope, name) for name in names])


def _travels(name: str, home: Home, space: Namespace) -> bool:
    """What a body has put under a name of the script may be beyond pickling."""
    from .dump import Pickler
    from .files import null_file

    try:
        Pickler(null_file(), home.origin, wants=lambda _, other: other == name).bind_all([(space.scope, name)])
    except Exception:
        return False
    return True


def _rank(value: object) -> int:
    """Values may run code of the script while they are read: functions and classes first."""
    order: tuple[type, ...] = (types.ModuleType, types.FunctionType, type)
    return next((rank for rank, kind in enumerate(order) if isinstance(value, kind)), len(order))


def _remove(path: str, pid: int) -> None:
    """By the process that wrote it; a forked child runs exit handlers too."""
    if pid == os.getpid():
        with contextlib.suppress(OSError):
            os.unlink(path)
