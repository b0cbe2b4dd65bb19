"""How a call ended, for whoever counts or writes it down: said once for each call, when nothing can change it any more."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from remoted.model import Status

if TYPE_CHECKING:
    from remoted.calls import Call


class Ending(NamedTuple):
    """``kind``: queue (durable), direct, or lease (as many direct calls as its client made)."""

    kind: str
    id: str
    uid: int
    #: What its user named it: untrusted text.
    name: str
    pool: str
    status: Status
    reason: str
    attempts: int
    queue_seconds: float
    run_seconds: float
    gpus: tuple[str, ...]
    worker: str
    result_bytes: int


def ending_of(call: Call, kind: str) -> Ending:
    """Of a call that has ended."""
    ended_at = call.ended_at or 0.0
    return Ending(
        kind=kind,
        id=call.id,
        uid=call.uid,
        name=call.name,
        pool=call.spec.pool.name,
        status=call.status,
        reason=call.reason.value if call.reason else "",
        attempts=call.attempts,
        queue_seconds=max(0.0, (call.started_at or ended_at) - call.submitted_at),
        run_seconds=call.run_seconds,
        gpus=call.devices,
        worker=call.worker_id,
        result_bytes=call.kept_bytes,
    )
