"""What a submission says, and what the end of a call says: between frames and the words of the use cases."""

from __future__ import annotations

import json
from typing import Any

from remoted.calls import Call, Request
from remoted.errors import BadRequest
from remoted.leases import Lease
from remoted.spec import parse_options
from remoted.store import Row
from remoted_client import wire

#: JSON bytes that an error and a traceback may each take of a header (wire.HEADER_BYTES holds both).
_TEXT_BYTES = 24 * 1024


def parse_request(frame: wire.Frame) -> Request:
    """Raises KeyError, TypeError, BadRequest on anything that is not as it must be."""
    header = frame.header
    arguments = str(header.get("arguments", ""))
    instance = header.get("instance")
    if instance is not None and (len(instance) != 3 or not all(isinstance(part, str) for part in instance)):
        raise BadRequest("BAD_REQUEST", "cannot read the instance: it is not [id, method, constructor]")
    key = header["key"]
    if not isinstance(key, str) or not 8 <= len(key) <= 64:
        raise BadRequest("BAD_REQUEST", "cannot use the submission key: it must have 8 to 64 characters")
    return Request(
        key=key,
        spec=str(header["spec"]),
        code=str(header["code"]),
        modules=str(header["modules"]),
        context=str(header["context"]),
        arguments=arguments,
        arguments_inline=None if arguments else frame.body,
        options=parse_options(header.get("options", {})),
        parent=str(header.get("parent", "")),
        instance=tuple(instance) if instance else None,
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
    """What a lease is for: calls of one pool in one set of surroundings, whose code and arguments the worker gets later."""
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
    )


def end_of(text: str) -> str:
    """As much of the end of a text as a header has room for: a letter may take up to six bytes there."""
    while len(text) * 6 > _TEXT_BYTES and (size := len(json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass"))) > _TEXT_BYTES:
        text = text[-(len(text) * _TEXT_BYTES // size) :]
    return text


def done_header(call: Call) -> dict[str, Any]:
    """The outcome of a live call that has just ended."""
    lease = {"accepted": call.last_page.accepted} if isinstance(call, Lease) else {}
    return {
        **lease,
        "op": "done",
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


def done_header_of_row(row: Row) -> dict[str, Any]:
    """The same, of a stored one."""
    return {
        "op": "done",
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
