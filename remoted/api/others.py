"""What a user sees of the others' work: as much as ``[privacy]`` says, and never more than name, user, pool, state, GPUs and times.

An administrator sees that much of everybody, and what he needs to end it: the job's id, its worker and that one's pid (decision 0095).
"""

from __future__ import annotations

from collections.abc import Iterator

from remoted.access import Peer, Rule
from remoted.api import schemas
from remoted.api.services import Services
from remoted.api.views import QUEUE_SHOWN
from remoted.calls import Call
from remoted.config import Seen
from remoted.model import Status


def seen(services: Services, peer: Peer) -> Seen:
    """How much this peer may see."""
    return Seen.WORK if administers(services, peer) else services.settings.config.privacy.others


def administers(services: Services, peer: Peer) -> bool:
    """May this peer end what is somebody else's?"""
    return services.jobs.access.allows(Rule.ADMIN, peer)


def work(services: Services, peer: Peer) -> list[schemas.OthersCall]:
    """What runs and what waits, each in the order in which it was submitted; the first ``QUEUE_SHOWN``."""
    if seen(services, peer) is not Seen.WORK:
        return []
    calls = sorted(_others(services, peer), key=lambda call: (call.status is not Status.IN_PROGRESS, call.submitted_at))
    show = _view_to_end if administers(services, peer) else _view
    return [show(services, call) for call in calls[:QUEUE_SHOWN]]


def _others(services: Services, peer: Peer) -> Iterator[Call]:
    for runner in (services.jobs, services.direct):
        yield from (call for call in runner.calls.values() if call.uid != peer.uid)


def _view(services: Services, call: Call) -> schemas.OthersCall:
    return schemas.OthersCall(
        uid=call.uid,
        name=call.name,
        pool=call.spec.pool.name,
        status=call.status.value,
        gpus=list(call.devices),
        submitted_at=call.submitted_at,
        started_at=call.started_at,
    )


def _view_to_end(services: Services, call: Call) -> schemas.OthersCall:
    process = services.engine.workers.get(call.worker_id)
    return _view(services, call).model_copy(update={"id": call.id, "worker": call.worker_id, "pid": process.pid if process else 0})
