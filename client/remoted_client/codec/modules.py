"""Project modules: code next to the script, or installed in editable mode, that the user edits between runs.

They travel as text, once, and are referred to by name. ``collect_modules`` takes the texts at the caller as its
process saw them; ``install_modules`` lets ``import`` find exactly these in the worker, under the original file
names. A worker that has imported another text of one of them cannot take it back: ``StaleModules``.
"""

from __future__ import annotations

import hashlib
import json
import os
import site
import sys
import tokenize
import types
from dataclasses import asdict, dataclass
from functools import cached_property, lru_cache
from typing import Any

from .blank import runnable

#: Never sent: the worker has its own.
_OWN = frozenset(("remoted", "remoted_client", "remoted_worker", "cloudpickle", "__main__", "__mp_main__"))


@dataclass(frozen=True)
class ModuleText:
    """One module. ``text`` is None for a package without ``__init__``; ``paths`` is a package's ``__path__``."""

    name: str
    file: str | None
    text: str | None
    paths: tuple[str, ...] | None
    digest: str

    @property
    def is_package(self) -> bool:
        return self.paths is not None


@dataclass(frozen=True)
class ModuleSet:
    """All project modules of a process."""

    modules: tuple[ModuleText, ...] = ()

    @cached_property
    def digest(self) -> str:
        """Names, files and texts, in one digest."""
        parts = [(each.name, each.file, each.paths, each.digest) for each in self.modules]
        return hashlib.blake2b(repr(parts).encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()

    @cached_property
    def by_name(self) -> dict[str, ModuleText]:
        return {each.name: each for each in self.modules}

    def to_bytes(self) -> bytes:
        return json.dumps([asdict(each) for each in self.modules]).encode()

    @classmethod
    def from_bytes(cls, data: bytes) -> ModuleSet:
        return cls(tuple(_module_text(each) for each in json.loads(data)))


def _module_text(fields: dict[str, object]) -> ModuleText:
    paths = fields["paths"]
    fields["paths"] = tuple(paths) if isinstance(paths, list) else None
    return ModuleText(**fields)  # type: ignore[arg-type]


class ModuleCollector:
    """Watches ``sys.modules``. Asked again with nothing imported since, it looks at the project's modules only."""

    def __init__(self) -> None:
        self._shape: tuple[int, str] | None = None
        self._known: dict[str, tuple[types.ModuleType, object, ModuleText]] = {}
        self._set = ModuleSet()

    def collect(self) -> ModuleSet:
        shape = (len(sys.modules), next(reversed(sys.modules)))
        if shape != self._shape or not self._all_same():
            self._shape = shape
            self._rescan()
        return self._set

    def _all_same(self) -> bool:
        """``importlib.reload`` gives a module a new spec."""
        modules = sys.modules
        for name, (module, spec, _) in self._known.items():  # noqa: SIM110 - asked at every call, and a generator costs as much again
            if modules.get(name) is not module or module.__spec__ is not spec:
                return False
        return True

    def _rescan(self) -> None:
        known = {}
        for name, module in list(sys.modules.items()):
            if isinstance(module, types.ModuleType) and _is_named(name, module):
                found = self._look(name, module)
                if found is not None:
                    known[name] = found
        self._known = known
        modules = tuple(text for _, (_, _, text) in sorted(known.items()))
        if modules != self._set.modules:
            self._set = ModuleSet(modules)

    def _look(self, name: str, module: types.ModuleType) -> tuple[types.ModuleType, object, ModuleText] | None:
        spec = getattr(module, "__spec__", None)
        known = self._known.get(name)
        if known is not None and known[0] is module and known[1] is spec:
            return known
        text = read_module(name, module)
        return None if text is None else (module, spec, text)


_collector = ModuleCollector()


def collect_modules() -> ModuleSet:
    """Every project module that this process has loaded."""
    return _collector.collect()


def read_module(name: str, module: types.ModuleType) -> ModuleText | None:
    """A module as text; None if it is not a project module."""
    file = getattr(module, "__file__", None)
    paths = getattr(module, "__path__", None)
    if file is None:
        return _namespace_package(name, paths)
    if not is_project_file(file):
        return None
    text = _source(name, module, file)
    if text is None:
        return None
    # The digest is that of the whole text: a worker compares it with what it has imported from disk itself.
    digest = getattr(_loader(module), "digest", "") or text_digest(text)
    return ModuleText(name, file, runnable(name, text), None if paths is None else tuple(map(str, paths)), digest)


def text_digest(text: str) -> str:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()


def is_project_file(file: object) -> bool:
    """A Python source file outside of what is installed."""
    return isinstance(file, str) and file.endswith(".py") and not is_installed(file)


@lru_cache(maxsize=4096)
def is_installed(path: str) -> bool:
    """Under the standard library or a folder of installed packages."""
    for each in {os.path.abspath(path), os.path.realpath(path)}:
        parts = each.split(os.sep)
        if "site-packages" in parts or "dist-packages" in parts:
            return True
        if any(each == root or each.startswith(root + os.sep) for root in _installed_roots()):
            return True
    return False


@lru_cache(maxsize=1)
def _installed_roots() -> frozenset[str]:
    """Without ``sysconfig``, whose paths cannot be had in a venv of Python 3.13.0."""
    version = f"python{sys.version_info[0]}.{sys.version_info[1]}"
    roots = [os.path.dirname(os.__file__), os.path.join(sys.base_exec_prefix, sys.platlibdir, version)]
    roots += getattr(site, "getsitepackages", list)()
    roots.append(getattr(site, "getusersitepackages", str)())
    found = {each for root in roots if root for each in (os.path.abspath(root), os.path.realpath(root))}
    return frozenset(found - {os.sep})


def _is_named(name: str, module: types.ModuleType) -> bool:
    """Under its own name (aliases such as ``os.path`` come with their module), and not one of ours."""
    return name.partition(".")[0] not in _OWN and getattr(module, "__name__", None) == name


def _namespace_package(name: str, paths: object) -> ModuleText | None:
    try:
        folders = tuple(str(each) for each in paths)  # type: ignore[attr-defined]
    except TypeError:
        return None
    if not folders or any(is_installed(each) or not os.path.isdir(each) for each in folders):
        return None
    return ModuleText(name, None, None, folders, text_digest(repr(folders)))


def _source(name: str, module: types.ModuleType, file: str) -> str | None:
    try:
        text = _loader(module).get_source(name)
        if isinstance(text, str):
            return text
    except (AttributeError, ImportError, OSError):
        pass
    try:
        with tokenize.open(file) as stream:
            return stream.read()
    except (OSError, SyntaxError, UnicodeDecodeError):
        return None


def _loader(module: types.ModuleType) -> Any:
    return getattr(getattr(module, "__spec__", None), "loader", None) or getattr(module, "__loader__", None)


def install_modules(modules: ModuleSet, recent_seconds: float = 0.0) -> None:
    """Let ``import`` find these texts. Raises ``StaleModules``, before any change, if others are loaded already.

    What came from disk is not looked at again within ``recent_seconds`` of the last look.
    """
    from .installed import finder

    finder().install(modules, recent_seconds)


def installed_modules() -> ModuleSet:
    """What was installed last."""
    from .installed import finder

    return finder().installed
