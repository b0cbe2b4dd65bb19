"""Where a call is made from: nothing in an ordinary script, the running job inside a worker.

The worker's runtime sets ``current``; a nested call reads it to name its parent (MECHANISMS 15).
"""

from __future__ import annotations

from contextvars import ContextVar
from typing import NamedTuple


class RunningCall(NamedTuple):
    """The job (or load-balanced call) whose body is running here."""

    id: str
    attempt: str


current: ContextVar[RunningCall | None] = ContextVar("remoted_current", default=None)
#: Set by the runtime while exactly one call runs: threads that the body started see no context variable.
sole: list[RunningCall] = []
#: True in a worker: it is handed its daemon and never starts one.
in_worker = False
#: Literals that were taken out of module texts before they travelled, by place (``codec.blank``).
values: dict[str, str] = {}


def value_of(place: str) -> str | None:
    """Stands in such a text. None, which is the environment's own value, where nobody brought it (a job tried again)."""
    return values.get(place)


def running_call() -> RunningCall | None:
    """The call whose body this code belongs to, or None outside of workers."""
    found = current.get()
    if found is None and len(sole) == 1:
        return sole[0]
    return found
