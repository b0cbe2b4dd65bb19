"""How a call ended, for whoever counts or writes it down: said once for each call, when nothing can change it any more."""

from __future__ import annotations

from dataclasses import dataclass

from remoted.model import Status


@dataclass(frozen=True, slots=True)
class Ending:
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
