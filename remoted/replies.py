"""What a worker says, parsed: it is as hostile as any client (boundary b3), so whatever is not as it must be raises."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from remoted.attempts import AttemptEnd, clean
from remoted.model import Reason
from remoted_client import wire


@dataclass(frozen=True, slots=True)
class Hello:
    """What a worker says of itself; only for comparison with what was asked for."""

    pid: int
    python: tuple[int, ...]
    cloudpickle: str

    def explain_mismatch(self, python: tuple[int, ...]) -> str:
        """Why a caller with this version of Python and the worker would not understand each other; "" if they would."""
        if self.python[:2] != python[:2]:
            return f"the worker has Python {_dotted(self.python)} and the caller {_dotted(python)}: code does not travel between them"
        if int(self.cloudpickle.split(".")[0]) < 3:
            return f"the worker has cloudpickle {self.cloudpickle}: 3 or newer is needed"
        return ""


def _dotted(version: tuple[int, ...]) -> str:
    return ".".join(map(str, version))


def parse_hello(header: Mapping[str, Any]) -> Hello:
    """Raises KeyError, TypeError, ValueError."""
    if header["protocol"] != wire.PROTOCOL:
        raise ValueError(f"the worker speaks protocol {header['protocol']}")
    python = header["python"]
    if not isinstance(python, list):
        raise TypeError("python is not a list")
    return Hello(pid=int(str(header["pid"])), python=tuple(int(part) for part in python), cloudpickle=str(header["cloudpickle"]))


def parse_end(frame: wire.Frame, stopped_by: Reason | None) -> AttemptEnd:
    """How an attempt ended; the payload is the listener's from here on. Raises KeyError, and then the frame is untouched."""
    if not frame.fds:
        return end_of(frame.header, frame.body, len(frame.body), stopped_by)
    return end_of(frame.header, b"", size_of(frame), stopped_by)._replace(payload=payload_of(frame))


def end_of(header: Mapping[str, Any], payload: bytes | int, size: int, stopped_by: Reason | None) -> AttemptEnd:
    """The same of a header that a worker has left in a file. What returned and is as usual has no more words. Raises KeyError."""
    ended_at = header.get("ended_at")
    moment = float(ended_at) if isinstance(ended_at, (int, float)) else None
    if "kind" not in header:
        return AttemptEnd("returned", payload=payload, size=size, stopped_by=stopped_by, ended_at=moment)
    code = header["exit_code"]
    return AttemptEnd(
        kind=clean(header["kind"]),
        message=clean(header["message"]),
        error_type=clean(header["error_type"]),
        traceback=clean(header["traceback"]),
        exit_code=code if isinstance(code, int) else None,
        payload=payload,
        size=size,
        constructed=bool(header.get("constructed")),
        stopped_by=stopped_by,
        ended_at=moment,
    )


def payload_of(frame: wire.Frame) -> bytes | int:
    for extra in frame.fds[1:]:
        os.close(extra)
    return frame.fds[0] if frame.fds else frame.body


def size_of(frame: wire.Frame) -> int:
    return os.fstat(frame.fds[0]).st_size if frame.fds else len(frame.body)


def close_payload(payload: bytes | int) -> None:
    if isinstance(payload, int):
        os.close(payload)
