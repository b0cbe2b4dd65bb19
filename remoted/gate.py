"""The gate before the scheduler: while it is closed (a drain) nothing new begins, and who may wait waits here.

That it is closed is kept in a file, so that a restarted daemon is drained too. Those who wait are kept nowhere else than in
memory: they are durable jobs, and the next daemon queues them again.
"""

from __future__ import annotations

import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from remoted.errors import Conflict, StoreError
from remoted.scheduler.state import PoolPolicy, Ticket, TicketId

log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Drain:
    """``refuses``: new jobs are turned away instead of waiting. ``why``: what the administrator tells everybody."""

    since: float
    refuses: bool
    why: str

    def __str__(self) -> str:
        return "an administrator drains this daemon" + (f" ({self.why})" if self.why else "")


class Gate:
    """``file``: where a drain is kept."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.drain = _read(file)
        #: Those who wait for its end, in order.
        self.held: dict[TicketId, tuple[Ticket, PoolPolicy]] = {}

    @property
    def is_closed(self) -> bool:
        return self.drain is not None

    def admit(self, can_wait: bool) -> None:
        """May a new call come in? Raises Conflict."""
        if self.drain is not None and (self.drain.refuses or not can_wait):
            raise Conflict("DRAINED", f"cannot take new work: {self.drain}; try again later")

    def close(self, drain: Drain) -> None:
        """Raises StoreError, and nothing has changed, when it cannot be kept."""
        _write(self._file, json.dumps(asdict(drain)))
        self.drain = drain

    def open(self) -> list[tuple[Ticket, PoolPolicy]]:
        """Those who waited, the first one first."""
        self._file.unlink(missing_ok=True)
        self.drain = None
        waiting, self.held = list(self.held.values()), {}
        return waiting

    def hold(self, ticket: Ticket, policy: PoolPolicy, first: bool = False) -> None:
        mine = {ticket.id: (ticket, policy)}
        self.held = {**mine, **self.held} if first else self.held
        self.held |= mine


def _read(file: Path) -> Drain | None:
    """A file that says nothing is a drain all the same: somebody closed the gate."""
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
        return Drain(float(document["since"]), bool(document["refuses"]), str(document["why"]))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError) as error:
        log.error("cannot read %s (%s): this daemon stays drained; `remotectl resume` ends that", file, error)
        return Drain(0.0, False, "")


def _write(file: Path, text: str) -> None:
    """Whole or not at all, and on the disk when it returns."""
    part = file.with_name(f"{file.name}.part")
    try:
        fd = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
        with os.fdopen(fd, "w", encoding="utf-8") as out:
            out.write(text)
            out.flush()
            os.fsync(fd)
        part.rename(file)
        folder = os.open(file.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        raise StoreError(f"cannot drain: {file} cannot be written: {error}") from error
