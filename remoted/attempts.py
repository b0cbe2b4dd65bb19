"""An attempt as a worker is asked for it, and as it ends: the words between the use cases and ``workers``."""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import NamedTuple, Protocol

from remoted.model import AttemptToken, Reason
from remoted.pipes import Unread


class Content(NamedTuple):
    """Bytes on their way: inline, a file that is opened when they are sent, or a descriptor that somebody else owns."""

    digest: str
    inline: bytes | None
    path: str | None = None
    fd: int | None = None

    def open(self) -> int:
        """A descriptor of the caller's own. Raises OSError."""
        if self.fd is not None:
            return os.dup(self.fd)
        assert self.path is not None
        return os.open(self.path, os.O_RDONLY | os.O_CLOEXEC | os.O_NOFOLLOW)


class Work(NamedTuple):
    """What a worker is asked for by all calls that were admitted together."""

    code: Content
    modules: Content | None
    context: Content
    stream: bool
    #: Without a daemon the worker keeps its outcome for the next one.
    is_kept: bool
    timeout_seconds: float | None
    #: Other calls may run in the same worker at the same time.
    concurrent: bool = False
    instance: dict[str, str] | None = None
    constructor: Content | None = None
    #: Bytes go in and come out as they are (HTTP routes).
    is_raw: bool = False
    #: The arguments are built-in values alone.
    is_plain: bool = False


class AttemptSpec(NamedTuple):
    """One try of a call, as the worker is asked to run it."""

    token: AttemptToken
    call_id: str
    work: Work
    arguments: Content
    #: It begins when those that the worker has already have ended.
    ahead: bool
    #: The how manyth call that this worker is given.
    position: int


@dataclass(frozen=True, slots=True)
class LeaseSpec:
    """A client's connection on its way to a worker. The two descriptors are the worker's from here on."""

    token: AttemptToken
    lease_id: str
    #: Of which spec, by digest: the worker tells it to the next daemon.
    spec: str
    context: Content
    connection: int
    page: int
    concurrent: bool


class AttemptEnd(NamedTuple):
    """How an attempt ended. ``kind``: the runtime's word, died, or unbegun (given ahead, and nothing of it ran). ``payload``: inline bytes or a descriptor (the listener's)."""

    kind: str
    message: str = ""
    error_type: str = ""
    traceback: str = ""
    exit_code: int | None = None
    reason: Reason | None = None
    payload: bytes | int = b""
    size: int = 0
    constructed: bool = False
    #: What asked for the stop, if anything did: CANCELLED, TIMEOUT, CALLER_GONE.
    stopped_by: Reason | None = None
    #: When, as its worker says that no daemon heard (Unix seconds); for show only.
    ended_at: float | None = None

    @property
    def is_small(self) -> bool:
        """The body returned, and what it returned is no file."""
        return self.kind == "returned" and isinstance(self.payload, bytes)

    def lasted(self, started_at: float, now: float) -> float:
        """For how many seconds, and no longer than until now."""
        return max(0.0, min(now, self.ended_at or now) - started_at)


def died(how: str, exit_code: int | None, want_of_memory: str, stopped_by: Reason | None) -> AttemptEnd:
    """Its worker has ended in the middle of it."""
    message, reason = f"the worker {how}", Reason.WORKER_DIED
    if want_of_memory:
        message, reason = f"{message}: {want_of_memory}", Reason.OOM_RAM
    return AttemptEnd("died", message=message, exit_code=exit_code, reason=reason, stopped_by=stopped_by)


class AttemptListener(Protocol):
    """Whoever asked for the attempt."""

    def on_begin(self) -> None:
        """What the worker was given ahead is at its turn."""
        ...

    def on_lasting(self) -> None:
        """It takes longer than was expected of it."""
        ...

    def on_output(self, stream: int, said: bytes | Unread) -> None: ...
    def on_item(self, number: int, payload: bytes | int, size: int) -> None: ...
    def on_mark(self, number: int) -> None: ...
    def on_end(self, end: AttemptEnd) -> None: ...


def clean(text: object) -> str:
    """What a worker says, as text that every store and reader takes: half a surrogate pair is no character."""
    return str(text).encode("utf-8", "backslashreplace").decode("utf-8") if text else ""
