"""Environments that ``dependencies=`` made: what lies there, and tidying up."""

from __future__ import annotations

from aiohttp import web

from remoted.api import schemas
from remoted.api.exchange import Ask, HttpRefusal, reply
from remoted.api.services import Services
from remoted.environments import EnvironmentEntry, EnvironmentFailed

#: An environment is marked as used when a worker is about to start in it; clocks of files are coarse.
_SLACK_SECONDS = 60.0


async def list_environments(services: Services, ask: Ask) -> web.StreamResponse:
    """The complete environments, the one used last first."""
    try:
        entries = await services.environments.list(ask.peer.identity)
    except EnvironmentFailed as error:
        raise _unavailable(error) from error
    return reply(schemas.EnvironmentList(environments=[_view(entry) for entry in entries]))


def _view(entry: EnvironmentEntry) -> schemas.Environment:
    return schemas.Environment(key=entry.key, requirements=list(entry.requirements), size_bytes=entry.size_bytes, last_used=entry.last_used)


async def prune(services: Services, ask: Ask) -> web.StreamResponse:
    """Remove those of yours that nobody used for so long. What this daemon has used since its start stays: workers may run in it."""
    uptime = services.clock.monotonic() - services.started_at
    unused = max(ask.body_as(schemas.PruneBody).unused_seconds, uptime + _SLACK_SECONDS)
    try:
        removed = await services.environments.prune(set(), unused, ask.peer.identity)
    except EnvironmentFailed as error:
        raise _unavailable(error) from error
    return reply(schemas.Pruned(removed=list(removed)))


def _unavailable(error: EnvironmentFailed) -> HttpRefusal:
    return HttpRefusal(503, "ENVIRONMENTS_UNAVAILABLE", str(error))
