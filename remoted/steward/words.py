"""What the daemon asks a steward and what the steward answers, as JSON documents; each answer is checked when it is read.

    ask      {"op": "begin" | "ensure" | "list" | "prune" | "cancel", "number": n}, document in the body
    answer   {"op": "output", "number": n}, bytes; {"op": "done" | "failed", "number": n}, document
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

from remoted.environments import Environment, EnvironmentEntry, EnvironmentRequest
from remoted_client import wire

#: Of what an installer said, in a failure: both must fit into one message.
_LOG_CHARACTERS = 8000
_MESSAGE_CHARACTERS = 2000
_ENTRIES = 200
_REQUIREMENTS_CHARACTERS = 200


def pack(document: object) -> bytes:
    """Raises ValueError for what does not fit into a message."""
    data = json.dumps(document).encode()
    if len(data) > wire.INLINE_BYTES:
        raise ValueError(f"cannot send {len(data)} bytes: {wire.INLINE_BYTES} fit into a message")
    return data


def unpack(data: bytes) -> dict[str, Any]:
    """Raises ValueError."""
    document = json.loads(data)
    if not isinstance(document, dict):
        raise ValueError("not an object")
    return document


def from_request(request: EnvironmentRequest, environ: Mapping[str, str]) -> dict[str, Any]:
    return {
        "executable": request.executable,
        "requirements": request.requirements,
        "isolated": request.isolated,
        "accelerate_downloads": request.accelerate_downloads,
        "environ": dict(environ),
    }


def to_request(uid: int, document: Mapping[str, Any]) -> EnvironmentRequest:
    return EnvironmentRequest(uid, document["executable"], tuple(document["requirements"]), document["isolated"], document["accelerate_downloads"])


def from_environment(found: Environment) -> dict[str, Any]:
    return {"key": found.key, "python": found.python, "built_now": found.built_now, "seconds": found.seconds, "variables": found.variables}


def to_environment(document: Mapping[str, Any]) -> Environment:
    """Raises ValueError, KeyError, TypeError: it is the user's word, and becomes a command line of the user's."""
    variables = {str(name): str(value) for name, value in dict(document["variables"]).items()}
    python = document["python"]
    if not isinstance(python, str) or not python.startswith("/") or "\0" in python:
        raise ValueError("the environment has no interpreter")
    return Environment(str(document["key"]), python, bool(document["built_now"]), float(document["seconds"]), variables)


def from_entries(entries: Iterable[EnvironmentEntry]) -> dict[str, Any]:
    shown = [[entry.key, " ".join(entry.requirements)[:_REQUIREMENTS_CHARACTERS], entry.size_bytes, entry.last_used] for entry in entries]
    return {"entries": shown[:_ENTRIES]}


def to_entries(document: Mapping[str, Any]) -> tuple[EnvironmentEntry, ...]:
    """Raises ValueError, KeyError, TypeError."""
    return tuple(EnvironmentEntry(str(key), tuple(str(text).split()), int(size), float(used)) for key, text, size, used in document["entries"])


def from_failure(error: BaseException) -> dict[str, Any]:
    """A sentence of the environments', or the name of what went wrong."""
    log = str(getattr(error, "log", ""))
    return {"message": str(error)[:_MESSAGE_CHARACTERS], "log": log[-_LOG_CHARACTERS:]}
