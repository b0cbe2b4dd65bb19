"""The configuration as it lies on the disk: one file, and a folder ``conf.d`` beside it whose files change what it says.

Files of the folder are read in the order of their names; a later one wins key by key, and a whole table is not replaced by a
part of it. Every problem is found, not the first one only, and named with its file, its key and the reason.
"""

from __future__ import annotations

import pwd
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, fields
from math import isfinite
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from remoted.config import SHARED_LIMITS, Config, UserSettings, UserShare
from remoted.errors import StartupError
from remoted.limits import Limits, Share
from remoted.trust import require_trusted
from remoted_client.suggest import did_you_mean

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FOLDER = "conf.d"
_Key = tuple[str, ...]
_LookUp = Callable[[str], int]


@dataclass(frozen=True, slots=True)
class Problem:
    """``key`` is dotted, "" for the whole file. With one that is not ``fatal`` a daemon can live."""

    file: Path
    key: str
    reason: str
    fatal: bool = True

    def __str__(self) -> str:
        return f"{self.file}: {self.key + ': ' if self.key else ''}{self.reason}"


@dataclass(frozen=True, slots=True)
class Reading:
    """What was found, good or not. ``keys``: all that the files set, dotted."""

    file: Path
    files: tuple[Path, ...]
    config: Config
    limits: Limits
    problems: tuple[Problem, ...] = ()
    keys: tuple[str, ...] = ()

    @property
    def fatal(self) -> tuple[Problem, ...]:
        return tuple(problem for problem in self.problems if problem.fatal)

    def require(self) -> Reading:
        """Itself. Raises StartupError naming every problem with which a daemon cannot live."""
        if self.fatal:
            raise StartupError("cannot use the configuration: " + "; ".join(map(str, self.fatal)))
        return self


def _uid_of(name: str) -> int:
    return pwd.getpwnam(name).pw_uid


def files_of(path: Path) -> tuple[Path, ...]:
    """The file, if it is there, and those of the folder beside it."""
    return (*([path] if path.exists() else []), *sorted((path.parent / FOLDER).glob("*.toml")))


def read(path: Path, is_shared: bool = False, look_up: _LookUp = _uid_of) -> Reading:
    """No file at all means the defaults. ``is_shared``: of a daemon for everybody, which believes only what is root's."""
    found = _Documents()
    files = files_of(path)
    if is_shared:
        found.require_trust((path.parent / FOLDER, *files))
    for file in files:
        found.add(file)
    config = found.validate(path)
    limits = _limits(config, is_shared, found.blame)
    limits.users.update(_shares(config, look_up, found))
    return Reading(path, files, config, limits, tuple(found.problems), found.keys)


@dataclass
class _Documents:
    """All files, merged; and which of them said what."""

    merged: dict[str, Any] = field(default_factory=dict)
    origins: dict[_Key, Path] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def require_trust(self, files: Iterable[Path]) -> None:
        for file in files:
            try:
                require_trusted([file])
            except StartupError as error:
                self.problems.append(Problem(file, "", str(error)))

    def add(self, file: Path) -> None:
        try:
            document = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            self.problems.append(Problem(file, "", f"cannot be read: {error}"))
            return
        for key, value in _leaves(document):
            for other in [other for other in self.origins if other[: len(key)] == key or key[: len(other)] == other]:
                del self.origins[other]
            self.origins[key] = file
            _put(self.merged, key, value)

    @property
    def keys(self) -> tuple[str, ...]:
        """All that is set, dotted; a table with nothing in it sets nothing."""
        return tuple(sorted(".".join(key) for key in self.origins if _get(self.merged, key) != {}))

    def blame(self, path: Path, key: _Key, reason: str, fatal: bool = True) -> None:
        """On the file that set the key, or a part of it."""
        file = next((file for known, file in self.origins.items() if known[: len(key)] == key or key[: len(known)] == known), path)
        self.problems.append(Problem(file, ".".join(key), reason, fatal))

    def said_in(self, key: _Key) -> Path:
        """The file that set it, or a part of it."""
        return next(file for known, file in self.origins.items() if known[: len(key)] == key)

    def validate(self, path: Path) -> Config:
        """Without what is wrong in it, so that the rest is looked at too."""
        try:
            return Config.model_validate(self.merged)
        except ValidationError as error:
            for item in error.errors(include_input=False, include_url=False):
                key = tuple(map(str, item["loc"]))
                self.blame(path, key, _reason(item["type"], item["msg"], key))
                _drop(self.merged, key)
        return self.validate(path)


def _leaves(document: Mapping[str, Any], above: _Key = ()) -> Iterator[tuple[_Key, Any]]:
    for name, value in document.items():
        key = (*above, name)
        if isinstance(value, dict) and value:
            yield from _leaves(value, key)
        else:
            yield key, value


def _put(document: dict[str, Any], key: _Key, value: Any) -> None:
    for name in key[:-1]:
        inner = document.get(name)
        if not isinstance(inner, dict):
            inner = document[name] = {}
        document = inner
    if value != {} or not isinstance(document.get(key[-1]), dict):
        document[key[-1]] = value


def _get(document: Any, key: _Key) -> Any:
    for name in key:
        document = document.get(name) if isinstance(document, dict) else None
    return document


def _drop(document: dict[str, Any], key: _Key) -> None:
    """The value there; if it is not there (an item of a list, a part of what is no table), what holds it."""
    first, *rest = key
    inner = document.get(first)
    if rest and isinstance(inner, dict) and rest[0] in inner:
        _drop(inner, tuple(rest))
    else:
        document.pop(first, None)


_Blame = Callable[..., None]
#: pydantic's words for what TOML calls otherwise.
_KINDS = {"int_type": "a whole number", "float_type": "a number", "bool_type": "true or false", "string_type": "a text in quotes", "tuple_type": "a list in brackets"}


def _reason(kind: str, message: str, key: _Key) -> str:
    """What is wrong there, in the words of the file that is read."""
    if kind == "extra_forbidden":
        return _unknown("setting", key[-1], _beside(key))
    if kind in ("model_type", "dict_type"):
        is_user = len(key) == 2 and key[0] == "users"
        problem = _unknown("setting", key[-1], UserSettings.model_fields) + ", and what one user has of his own" if is_user else "it"
        return f"{problem} is a table: write [{'.'.join(key)}], and what is in it below"
    return f"it must be {_KINDS[kind]}" if kind in _KINDS else message.replace("Input should be", "it must be")


def _unknown(what: str, name: str, known: Iterable[str]) -> str:
    """One that may be meant, and where the others are."""
    return f"this {what} does not exist{did_you_mean(name, known) or ';'} `remotectl config defaults` lists those that do"


def _beside(key: _Key) -> Iterable[str]:
    """What could stand where this key does."""
    model: Any = Config
    for name in key[:-1]:
        model = UserShare if model is UserSettings else model.model_fields[name].annotation
    return list(model.model_fields)


def default_limits(is_shared: bool) -> Limits:
    return Limits(**(SHARED_LIMITS if is_shared else {}))  # type: ignore[arg-type]


def _limits(config: Config, is_shared: bool, blame: _Blame) -> Limits:
    """The defaults with ``[limits]`` over them."""
    chosen = default_limits(is_shared).values()
    kinds = {found.name: found.type for found in fields(Limits)}
    for name, value in config.limits.items():
        if name not in chosen:
            blame(Path(), ("limits", name), _unknown("limit", name, chosen))
        elif problem := _problem_of(value, kinds[name] == "int"):
            blame(Path(), ("limits", name), f"{value:g} {problem}")
        else:
            chosen[name] = int(value) if kinds[name] == "int" else value
    limits = Limits(**chosen)  # type: ignore[arg-type]
    if "workers_reserved" in config.limits and limits.workers_reserved > limits.reserve:
        blame(Path(), ("limits", "workers_reserved"), f"no more than a quarter of workers_total ({limits.workers_total}) is reserved: {limits.reserve}", fatal=False)
    return limits


def _problem_of(value: float, is_whole: bool) -> str:
    if not isfinite(value):
        return "is no amount"
    if value < 0:
        return "is negative"
    return "is no whole number" if is_whole and value != int(value) else ""


def _shares(config: Config, look_up: _LookUp, documents: _Documents) -> dict[int, Share]:
    """By uid. An account that is gone is no reason not to start."""
    found: dict[int, Share] = {}
    names: dict[int, str] = {}
    for name, share in config.users.shares.items():
        try:
            uid = int(name) if name.isdecimal() else look_up(name)
        except (KeyError, OSError):
            documents.blame(Path(), ("users", name), "there is no such account (and no such setting), so nothing comes of it", fatal=False)
            continue
        if uid in found:
            first = ("users", names[uid])
            documents.blame(Path(), ("users", name), f"uid {uid} is named twice: it is {'.'.join(first)} in {documents.said_in(first)} too; put both into one table")
        found[uid], names[uid] = Share(**share.model_dump()), name
    return found
