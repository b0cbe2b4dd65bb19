"""The import hook of a worker: it stands first on ``sys.meta_path`` and serves the caller's texts.

A project module that the caller had not loaded (an import inside a body) comes from disk, as usual; the hook
remembers the text, so that an edit between two runs is seen before old code is run.
"""

from __future__ import annotations

import linecache
import os
import sys
import time
import types
from collections.abc import Iterator, Sequence
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import decode_source, spec_from_file_location

from .errors import StaleModules
from .modules import ModuleSet, ModuleText, is_project_file, read_module, text_digest


class TextLoader(SourceFileLoader):
    """Runs a text, whatever its file holds by now."""

    def __init__(self, name: str, file: str, text: str, digest: str, stamp: object = None) -> None:
        super().__init__(name, file)
        self._text = text
        self._stamp = stamp
        self.digest = digest

    def is_edited(self) -> bool:
        """Has the file that the text was read from changed?"""
        return self._stamp is not None and _stamp(self.path) != self._stamp

    def get_source(self, fullname: str) -> str:
        return self._text

    def get_code(self, fullname: str) -> types.CodeType:
        return compile(self._text, self.path, "exec", dont_inherit=True)

    def exec_module(self, module: types.ModuleType) -> None:
        """``linecache`` prefers the disk, unless it is told."""
        lines = self._text.splitlines(keepends=True)
        linecache.cache[self.path] = (len(self._text), None, lines, self.path)
        super().exec_module(module)


class ProjectFinder:
    """Finds project modules (``importlib.abc`` would bring 8 ms of imports for its base class); knows the digest of every text that it let run."""

    def __init__(self) -> None:
        self.installed = ModuleSet()
        self._looked = 0.0
        self._checked: tuple[str, list[str]] | None = None
        self._from_disk: list[TextLoader] = []

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None
    ) -> ModuleSpec | None:
        found = self.installed.by_name.get(fullname)
        if found is not None:
            return _spec(found)
        spec = self._elsewhere(fullname, path, target)
        if spec is not None and isinstance(_remembering(spec).loader, TextLoader):
            self._from_disk.append(spec.loader)  # type: ignore[arg-type]
        return spec

    def install(self, modules: ModuleSet, recent_seconds: float = 0.0) -> None:
        """Serve these texts from now on. The same again costs a look at what came from disk, unless that was just done."""
        checked = (modules.digest, sys.path)
        if checked == self._checked:
            now = time.monotonic()
            if now - self._looked < recent_seconds:
                return
            self._looked = now
            if not any(each.is_edited() for each in self._from_disk):
                return
        stale = tuple(self._stale(modules))
        if stale:
            raise StaleModules(stale)
        self.installed = modules
        self._checked = (modules.digest, list(sys.path))

    def _stale(self, modules: ModuleSet) -> Iterator[str]:
        for name, module in list(sys.modules.items()):
            wanted = modules.by_name.get(name)
            if wanted is not None:
                if wanted.text is not None and not _is_loaded_from(wanted, module):
                    yield name
            elif isinstance(_loader(module), TextLoader) and self._changed(name, module):
                yield name

    def _changed(self, name: str, module: types.ModuleType) -> bool:
        """Would a module that the caller has not loaded be another one, if it were imported now?"""
        parent = sys.modules.get(name.rpartition(".")[0])
        spec = self._elsewhere(name, getattr(parent, "__path__", None), None)
        if spec is None or not is_project_file(spec.origin):
            return False
        found = _remembering(spec)
        return getattr(found.loader, "digest", "") != _loader(module).digest or spec.origin != module.__file__  # type: ignore[attr-defined]

    def _elsewhere(
        self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None
    ) -> ModuleSpec | None:
        for finder in sys.meta_path:
            find = None if finder is self else getattr(finder, "find_spec", None)
            spec = find(fullname, path, target) if find is not None else None
            if spec is not None:
                return spec  # type: ignore[no-any-return]
        return None


def finder() -> ProjectFinder:
    """The one hook of this process, put in place at the first call."""
    if sys.meta_path and isinstance(sys.meta_path[0], ProjectFinder):
        return sys.meta_path[0]
    found = next((each for each in sys.meta_path if isinstance(each, ProjectFinder)), None)
    if found is None:
        found = ProjectFinder()
        sys.meta_path.insert(0, found)
    return found


def _spec(found: ModuleText) -> ModuleSpec | None:
    if found.file is None or found.text is None:
        spec = ModuleSpec(found.name, None, is_package=True)
        spec.submodule_search_locations = list(found.paths or ())
        return spec
    paths = None if found.paths is None else list(found.paths)
    loader = TextLoader(found.name, found.file, found.text, found.digest)
    return spec_from_file_location(found.name, found.file, loader=loader, submodule_search_locations=paths)


def _remembering(spec: ModuleSpec) -> ModuleSpec:
    """The same spec, with a loader that reads the file once and for all."""
    if type(spec.loader) is SourceFileLoader and is_project_file(spec.origin) and spec.origin is not None:
        stamp = _stamp(spec.origin)
        try:
            text = decode_source(spec.loader.get_data(os.fspath(spec.origin)))
        except (OSError, SyntaxError, UnicodeDecodeError):
            return spec  # import itself will say what is wrong
        spec.loader = TextLoader(spec.name, spec.origin, text, text_digest(text), stamp)
    return spec


def _stamp(file: str) -> object:
    try:
        status = os.stat(file)
    except OSError:
        return ()
    return status.st_mtime_ns, status.st_size, status.st_ino


def _loader(module: object) -> object:
    return getattr(getattr(module, "__spec__", None), "loader", None)


def _is_loaded_from(wanted: ModuleText, module: types.ModuleType) -> bool:
    loader = _loader(module)
    if isinstance(loader, TextLoader):
        return loader.digest == wanted.digest and loader.path == wanted.file
    found = read_module(wanted.name, module)
    return found is not None and found.digest == wanted.digest
