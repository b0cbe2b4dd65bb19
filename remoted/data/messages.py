"""What a submission says, and what the end of a call says: between frames and the words of the use cases."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, NamedTuple

from remoted.calls import Call
from remoted.errors import BadRequest
from remoted.leases import Lease
from remoted.model import Status
from remoted.requests import Request
from remoted.spec import parse_options
from remoted.store import Row
from remoted_client import wire

#: JSON bytes that an error and a traceback may each take of a header (wire.HEADER_BYTES holds both).
_TEXT_BYTES = 24 * 1024
_OF_EACH_CALL = frozenset({"calls", "sizes", "fresh"})
#: Of a header that is remembered: there are as many as connections.
_COMMON_BYTES = 2048


class Submission(NamedTuple):
    """Calls of one frame: what they have in common, and of each its key and arguments."""

    common: Request
    calls: list[tuple[str, bytes | None]]

    def requests(self, common: Request) -> Iterator[Request]:
        for key, arguments in self.calls:
            yield common.of_call(key, arguments)


class SubmissionParser:
    """Of one connection: calls of one function follow one another, and have a request in common for as long as only keys and arguments differ."""

    def __init__(self) -> None:
        self._common: dict[str, Any] = {}
        self._request: Request | None = None

    def parse(self, frame: wire.Frame) -> Submission:
        """Raises KeyError, TypeError, ValueError, BadRequest on anything that is not as it must be."""
        header = frame.header
        arguments = _text(header.get("arguments", ""))
        calls: list[tuple[str, bytes | None]] = [(_checked_key(key), None if arguments else body) for key, body in wire.calls_of(frame)]
        if arguments and len(calls) > 1:
            raise BadRequest("BAD_REQUEST", "cannot read the calls: arguments of such a size are one call's alone")
        common = {name: value for name, value in header.items() if name not in _OF_EACH_CALL}
        if self._request is not None and common == self._common:
            return Submission(self._request, calls)
        request = _parse_common(header, arguments)
        if len(wire.encode_header(common)) <= _COMMON_BYTES:
            self._common, self._request = common, request
        return Submission(request, calls)


def _text(value: object) -> str:
    """As it is: headers that look alike when compared (1 and true) must mean the same."""
    if not isinstance(value, str):
        raise TypeError("a digest or an id is not a text")
    return value


def _checked_key(key: object) -> str:
    if not isinstance(key, str) or not 8 <= len(key) <= 64:
        raise BadRequest("BAD_REQUEST", "cannot use the submission key: it must have 8 to 64 characters")
    return key


def _parse_common(header: dict[str, Any], arguments: str) -> Request:
    instance = header.get("instance")
    if instance is not None and not (isinstance(instance, list) and len(instance) == 3 and all(isinstance(part, str) for part in instance)):
        raise BadRequest("BAD_REQUEST", "cannot read the instance: it is not [id, method, constructor]")
    parent = _text(header.get("parent", ""))
    if not parent.isascii():
        raise BadRequest("BAD_REQUEST", "cannot read the parent: it is no id of a call")
    return Request(
        key="",
        spec=_text(header["spec"]),
        code=_text(header["code"]),
        modules=_text(header["modules"]),
        context=_text(header["context"]),
        arguments=arguments,
        arguments_inline=None,
        options=parse_options(header.get("options", {})),
        parent=parent,
        instance=tuple(instance) if instance else None,
        is_plain=bool(header.get("plain")),
    )


def parse_route(frame: wire.Frame) -> Request:
    """What all calls of an HTTP route share; their arguments come with each request."""
    header = frame.header
    return Request(
        key=str(header["key"])[:64],
        spec=str(header["spec"]),
        code=str(header["code"]),
        modules=str(header["modules"]),
        context=str(header["context"]),
        arguments="",
        arguments_inline=b"",
        options=parse_options(header.get("options", {})),
    )


def parse_lease(frame: wire.Frame) -> Request:
    """What a lease is for: calls of one pool in one set of surroundings, whose code and arguments the worker gets later.

    One for an instance is for the worker in which that lives.
    """
    header = frame.header
    return Request(
        key="",
        spec=str(header["spec"]),
        code="",
        modules="",
        context=str(header["context"]),
        arguments="",
        arguments_inline=b"",
        options=parse_options({"name": header.get("name")}),
        instance=(instance_of(header), "", "") if "instance" in header else None,
    )


def instance_of(header: dict[str, Any]) -> str:
    """Its id. Raises KeyError, BadRequest."""
    instance = header["instance"]
    if not isinstance(instance, str) or not 8 <= len(instance) <= 64:
        raise BadRequest("BAD_REQUEST", "cannot read the instance: its id must have 8 to 64 characters")
    return instance


def end_of(text: str) -> str:
    """As much of the end of a text as a header has room for: a letter may take up to six bytes there."""
    while len(text) * 6 > _TEXT_BYTES and (size := len(json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass"))) > _TEXT_BYTES:
        text = text[-(len(text) * _TEXT_BYTES // size) :]
    return text


def done_word(call: Call) -> dict[str, Any]:
    """The outcome of a live call that has just ended."""
    if call.result_kind == "returned" and call.status is Status.COMPLETED and call.attempts == 1 and not (call.items or call.devices or call.reconstructed):
        return {"id": call.id, "worker": call.worker_id, "submitted_at": call.submitted_at, "started_at": call.started_at, "ended_at": call.ended_at, "run_seconds": call.run_seconds}
    lease = {"accepted": call.last_page.accepted} if isinstance(call, Lease) else {}
    header = {
        **lease,
        "id": call.id,
        "status": call.status.value,
        "reason": call.reason.value if call.reason else "",
        "kind": call.result_kind,
        "error": end_of(call.error),
        "error_type": call.error_type[:1000],
        "traceback": end_of(call.traceback),
        "attempts": call.attempts,
        "worker": call.worker_id,
        "gpus": list(call.devices),
        "submitted_at": call.submitted_at,
        "started_at": call.started_at,
        "ended_at": call.ended_at,
        "run_seconds": call.run_seconds,
        "items": len(call.items),
        "reconstructed": call.reconstructed,
    }
    return _without_the_usual(header)


def done_word_of_row(row: Row) -> dict[str, Any]:
    """The same, of a stored one."""
    header = {
        "id": row["id"],
        "status": row["status"],
        "reason": row["state_reason"],
        "kind": row["result_kind"],
        "error": end_of(row["error"]),
        "error_type": row["error_type"][:1000],
        "traceback": end_of(row["traceback"]),
        "attempts": row["attempts"],
        "worker": row["worker"],
        "gpus": row["gpus"].split(),
        "submitted_at": row["submitted_at"],
        "started_at": row["started_at"],
        "ended_at": row["ended_at"],
        "run_seconds": row["run_seconds"],
        "items": row["items"],
        "reconstructed": bool(row["reconstructed"]),
    }
    return _without_the_usual(header)


def _without_the_usual(header: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in header.items() if name not in wire.DONE or wire.DONE[name] != value}
