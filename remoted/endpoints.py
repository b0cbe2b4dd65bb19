"""HTTP routes of functions: who registered which, and how a request becomes a direct call.

A client registers a route with everything that a call needs (spec, code, modules, surroundings); it is there for as long
as the client's connection. One user's routes are nobody else's: another's is not found. Requests travel to the worker as
bytes, are bound to the parameters there, and come back as bytes (docs/decisions/0010).
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from urllib.parse import unquote_to_bytes

from remoted.access import Peer
from remoted.calls import Call
from remoted.direct import DirectCalls
from remoted.errors import BadRequest, Conflict, NotFound, OverLimit
from remoted.limits import Limits
from remoted.requests import Request

METHODS = ("GET", "POST", "PUT", "DELETE", "PATCH")
_PATH_CHARACTERS = 200
#: So many routes are named to somebody who is lost.
_TOLD = 20


class Owner(Protocol):
    """The client that registered a route: it sees what calls of it print, and how they end."""

    @property
    def pid(self) -> int: ...
    def on_output(self, stream: int, data: bytes) -> None: ...
    def on_served(self, endpoint: Endpoint, status: int, seconds: float, call: Call | None) -> None: ...


@dataclass(frozen=True, eq=False)
class Endpoint:
    """One route. ``operation`` and ``components`` are the client's description of it, for its own user."""

    uid: int
    method: str
    path: str
    request: Request
    operation: dict[str, Any]
    components: dict[str, Any]
    is_stream: bool
    owner: Owner

    def match(self, parts: list[str]) -> dict[str, str] | None:
        """The path's parameters; None if it is another path."""
        mine = self.path.split("/")
        if len(mine) != len(parts):
            return None
        parameters: dict[str, str] = {}
        for expected, part in zip(mine, parts, strict=True):
            if expected.startswith("{"):
                parameters[expected[1:-1]] = part
            elif expected != part:
                return None
        return parameters

    @property
    def shape(self) -> str:
        """Equal for routes that no request could tell apart."""
        return "/".join("{}" if part.startswith("{") else part for part in self.path.split("/"))


class WrongMethod(BadRequest):
    """The path is there, for other methods."""

    http_status = 405

    def __init__(self, allowed: str) -> None:
        super().__init__("WRONG_METHOD", f"cannot use this method here: use {allowed}")
        self.allowed = allowed


class Endpoints:
    """The routes of all users."""

    def __init__(self, direct: DirectCalls, limits: Limits) -> None:
        self._direct = direct
        self._limits = limits
        self._of: dict[int, list[Endpoint]] = {}

    def __len__(self) -> int:
        return sum(map(len, self._of.values()))

    def of(self, peer: Peer, pid: int | None = None) -> list[Endpoint]:
        """This user's, by path; with ``pid`` only those of one process."""
        mine = [endpoint for endpoint in self._of.get(peer.uid, ()) if pid in (None, endpoint.owner.pid)]
        return sorted(mine, key=lambda endpoint: (endpoint.path, endpoint.method))

    def add(self, peer: Peer, method: str, path: str, request: Request, description: bytes, owner: Owner) -> Endpoint:
        """Raises Refused: for what this host cannot serve, and for a route that another process has."""
        if method not in METHODS or not path.startswith("/") or not path.isprintable() or len(path) > _PATH_CHARACTERS:
            raise BadRequest("BAD_ROUTE", f"cannot register this route: it needs one of {', '.join(METHODS)} and a path of at most {_PATH_CHARACTERS} characters")
        spec = self._direct.check(peer, request)
        operation, components = _parse(description)
        endpoint = Endpoint(peer.uid, method, path, request._replace(is_raw=True), operation, components, spec.stream, owner)
        mine = self._of.setdefault(peer.uid, [])
        for other in mine:
            if (other.method, other.shape) == (method, endpoint.shape):
                who = "this process" if other.owner is owner else f"your process {other.owner.pid}"
                raise Conflict("ROUTE_TAKEN", f"cannot serve {method} {path}: {who} serves {method} {other.path}; end that one first, or give this one another path=")
        if len(mine) >= self._limits.routes_per_uid:
            raise OverLimit("OVER_LIMIT", f"cannot serve {method} {path}: the limit routes_per_uid is {self._limits.routes_per_uid}")
        mine.append(endpoint)
        for digest in request.digests:
            self._direct.contents.hold(peer.uid, digest)
        return endpoint

    def drop(self, endpoint: Endpoint) -> None:
        """Its client is gone. Calls that run go on."""
        mine = self._of[endpoint.uid]
        mine.remove(endpoint)
        if not mine:
            del self._of[endpoint.uid]
        for digest in endpoint.request.digests:
            self._direct.contents.release(endpoint.uid, digest)

    def find(self, peer: Peer, method: str, raw_path: str, pid: int | None = None) -> tuple[Endpoint, dict[str, str]]:
        """The route of an undecoded path, texts before parameters. Raises NotFound, WrongMethod."""
        here = sorted(self._matching(self.of(peer, pid), _decode(raw_path)), key=lambda found: found[0].shape.count("{}"))
        for endpoint, parameters in here:
            if endpoint.method == method:
                return endpoint, parameters
        if here:
            raise WrongMethod(", ".join(sorted({endpoint.method for endpoint, _ in here})))
        raise NotFound("NO_ROUTE", f"cannot find this path: {self._tell(peer, pid)}")

    def _tell(self, peer: Peer, pid: int | None) -> str:
        """What there is. Whoever asks for one process's routes (``remotectl serve``) has its own place for them."""
        found = [f"{endpoint.method} {endpoint.path}" for endpoint in self.of(peer, pid)]
        if not found:
            return "no function has a route here; serve() or `remotectl serve` gives it one"
        more = [f"{len(found) - _TOLD} more"] if len(found) > _TOLD else []
        return f"there is {', '.join(found[:_TOLD] + more)}" + ("" if pid is not None else ", each below /f")

    def _matching(self, endpoints: list[Endpoint], parts: list[str]) -> Iterator[tuple[Endpoint, dict[str, str]]]:
        for endpoint in endpoints:
            parameters = endpoint.match(parts)
            if parameters is not None:
                yield endpoint, parameters

    def call(self, endpoint: Endpoint, request: bytes) -> Call:
        """Begin the call of a request. Raises Refused."""
        return self._direct.submit(Peer(endpoint.uid, endpoint.uid, 0), endpoint.request._replace(arguments_inline=request), "")

    def leave(self, call: Call) -> None:
        """Nobody waits for its answer any more."""
        self._direct.leave_alone(call)

    def credit(self, call: Call, items: int) -> None:
        self._direct.credit(call, items)


def _decode(raw_path: str) -> list[str]:
    """The parts of a path: split first, so that an encoded slash stays in its part. Raises NotFound on what is no text."""
    try:
        return [unquote_to_bytes(part).decode("utf-8") for part in raw_path.split("/")]
    except UnicodeDecodeError:
        raise NotFound("NO_ROUTE", "cannot find this path: it is not UTF-8") from None


def _parse(description: bytes) -> tuple[dict[str, Any], dict[str, Any]]:
    """Shown to its own user and to nobody else; only that it is JSON of the right shape matters here."""
    try:
        document = json.loads(description)
        operation, components = document["operation"], document["components"]
    except (ValueError, KeyError, TypeError, RecursionError):
        operation = components = None
    if not isinstance(operation, dict) or not isinstance(components, dict):
        raise BadRequest("BAD_ROUTE", "cannot register this route: its description is not JSON with operation and components")
    return operation, components
