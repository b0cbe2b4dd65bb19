"""What a caller asks for: requirements, checked and spelled in one way, and the interpreter they shall fit.

A requirement reaches uv only as a line of a file, in the spelling made here; nothing that uv could read as an
option, a path or a URL gets through. The checks are the names-and-versions part of PEP 508.

    EnvironmentFailed       it cannot be built; carries the installer's log
    └── BadRequirement      not of the accepted form; nothing was run
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass

from remoted.access import Identity
from remoted.errors import RemotedError

_NAME = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
_CLAUSE = r"(?:===|==|~=|!=|<=|>=|<|>)\s*[A-Za-z0-9][A-Za-z0-9.*+!_-]*"
_CLAUSES = rf"{_CLAUSE}(?:\s*,\s*{_CLAUSE})*"
_REQUIREMENT = re.compile(
    rf"\s*(?P<name>{_NAME})\s*(?:\[(?P<extras>[A-Za-z0-9._,\s-]*)\])?"
    rf"\s*(?:\((?P<bracketed>{_CLAUSES})\)|(?P<plain>{_CLAUSES})?)\s*(?:;(?P<marker>[^;]+))?"
)
_MARKER_VARIABLES = (
    "os_name|sys_platform|platform_machine|platform_python_implementation|platform_release|platform_system|platform_version|"
    "python_version|python_full_version|implementation_name|implementation_version"
)
#: No space inside quotes: uv looks for its per-requirement options after a space.
_MARKER_TOKEN = re.compile(rf"\s*(\(|\)|<=|>=|===|==|~=|!=|<|>|'[\w.+*-]*'|\"[\w.+*-]*\"|(?:and|or|not|in|{_MARKER_VARIABLES})\b)")
_REQUIREMENT_CHARACTERS = 1000


class EnvironmentFailed(RemotedError):
    """The environment could not be built. ``log`` is the end of what the installer wrote."""

    def __init__(self, message: str, log: str = "") -> None:
        super().__init__(message)
        self.log = log


class BadRequirement(EnvironmentFailed):
    """A requirement that is not accepted; the message quotes it and says what is."""


@dataclass(frozen=True, slots=True)
class EnvironmentRequest:
    """What one function needs. ``executable`` is the caller's ``sys.executable``."""

    uid: int
    executable: str
    requirements: tuple[str, ...]
    isolated: bool
    accelerate_downloads: bool
    #: As whom it is built, where the daemon can become somebody else.
    identity: Identity | None = None

    @property
    def digest(self) -> str:
        """The id of the request as it was asked, known before anything was resolved (32 hex digits)."""
        facts = [self.uid, self.executable, sorted(set(self.requirements)), self.isolated, self.accelerate_downloads]
        return digest_of(facts)


def digest_of(facts: object) -> str:
    """128 bits of the SHA-256 of a JSON document: 32 hex digits."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:32]


def normalise_name(name: str) -> str:
    """``Foo._Bar`` and ``foo-bar`` are the same package (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def normalise(requirements: Iterable[str]) -> tuple[str, ...]:
    """One spelling of each, sorted, without repetitions. Raises BadRequirement."""
    return tuple(sorted({normalise_requirement(text) for text in requirements}))


def normalise_requirement(text: str) -> str:
    """``" Foo [b, a] >= 1 "`` becomes ``foo[a,b]>=1``. Raises BadRequirement."""
    found = _REQUIREMENT.fullmatch(text) if len(text) <= _REQUIREMENT_CHARACTERS and text.isascii() and text.isprintable() else None
    if found is None:
        raise _bad(text)
    extras = sorted({normalise_name(extra.strip()) for extra in (found["extras"] or "").split(",") if extra.strip()})
    clauses = sorted("".join(clause.split()) for clause in (found["bracketed"] or found["plain"] or "").split(",") if clause.strip())
    marker = f" ; {_normalise_marker(found['marker'], text)}" if found["marker"] else ""
    return normalise_name(found["name"]) + (f"[{','.join(extras)}]" if extras else "") + ",".join(clauses) + marker


def _normalise_marker(marker: str, text: str) -> str:
    tokens, place = [], 0
    while marker[place:].strip():
        found = _MARKER_TOKEN.match(marker, place)
        if found is None:
            raise _bad(text)
        tokens.append(found[1].replace("'", '"'))
        place = found.end()
    if not tokens:
        raise _bad(text)
    return " ".join(tokens)


def _bad(text: str) -> BadRequirement:
    quoted = repr(text if len(text) <= 100 else text[:100] + "...")
    start = text.lstrip()
    if start.startswith("-"):
        reason = "it is an option, and only packages are taken here; name a package, such as 'numpy==2.*'"
    elif "://" in text or "@" in text or start.startswith((".", "/", "~", "file:")):
        reason = (
            "it is a URL or a path, whose content may change under the same name; install it in your own environment, "
            "which functions see too, or put a wheel into one of the wheel_folders of [environments]"
        )
    else:
        reason = "it is not of the form name[extras]==version; marker; write it such as 'numpy==2.*'"
    return BadRequirement(f"cannot use the requirement {quoted}: {reason}")
