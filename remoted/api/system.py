"""The daemon as a whole: version, status, configuration, its pauses and its end."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable

from aiohttp import web

import remoted
from remoted.access import Rule
from remoted.api import devices, others, schemas, views, workers
from remoted.api.exchange import Ask, reply
from remoted.api.services import Services
from remoted.config import Seen
from remoted.gate import Drain
from remoted.model import Status
from remoted_client import wire

log = logging.getLogger(__name__)
_API = 1


async def version(services: Services, ask: Ask) -> web.StreamResponse:
    """Who answers."""
    return reply(schemas.Version(version=remoted.__version__, protocol=wire.PROTOCOL, api=_API, mode=services.mode, pid=os.getpid()))


async def status(services: Services, ask: Ask) -> web.StreamResponse:
    """Everything at a glance: daemon, GPUs, pools, workers, what runs and what waits."""
    await devices.refresh(services)
    calls = {call.id: call for call in views.live(services, ask.peer)}
    gpus = await devices.views(services, ask.peer)
    found, servers = await workers.views(services, ask.peer)
    return reply(
        schemas.Status(
            daemon=_daemon(services),
            gpus=gpus,
            gpu_problem=services.engine.devices.problem,
            gpus_seen_at=devices.seen_at(services),
            pools=workers.pools(services, ask.peer),
            workers=found,
            fork_servers=servers,
            running=[views.of_call(services, call) for call in calls.values() if call.status is Status.IN_PROGRESS],
            queue=views.queue(services, ask.peer, calls),
            others=others.work(services, ask.peer),
            counts=_counts(services, [call.status for call in calls.values()], len(found) if others.seen(services, ask.peer) is Seen.NOTHING else None),
        )
    )


def _daemon(services: Services) -> schemas.Daemon:
    uptime = services.clock.monotonic() - services.started_at
    return schemas.Daemon(
        version=remoted.__version__,
        mode=services.mode,
        pid=os.getpid(),
        uid=os.geteuid(),
        started_at=services.clock.wall() - uptime,
        uptime_seconds=uptime,
        loop_lag_seconds=services.lag.worst_seconds,
        draining=services.engine.is_stopping or services.engine.gate.is_closed,
        drain=_drain(services),
        sockets=os.fspath(services.paths.sockets),
    )


def _counts(services: Services, statuses: list[Status], workers: int | None) -> schemas.Counts:
    """``workers``: how many may be told of; None is everybody's."""
    scheduler = services.engine.scheduler
    return schemas.Counts(
        queued=statuses.count(Status.IN_QUEUE),
        running=statuses.count(Status.IN_PROGRESS),
        workers=len(scheduler.workers) if workers is None else workers,
        completed=services.jobs.completed,
        cpus=scheduler.cpus,
        cpus_used=scheduler.cpus_used(),
    )


async def metrics(services: Services, ask: Ask) -> web.StreamResponse:
    """Counters for Prometheus. By user only for an administrator: how much who works is nobody else's affair."""
    await devices.refresh(services)
    by_user = services.jobs.access.allows(Rule.ADMIN, ask.peer)
    render = await asyncio.to_thread(_import_metrics)
    return web.Response(body=render(services, by_user), headers={"Content-Type": "text/plain; version=0.0.4; charset=utf-8"})


def _import_metrics() -> Callable[[Services, bool], bytes]:
    """Only once somebody asks: the library is 5 MB of memory that a daemon without Prometheus has no use for."""
    from remoted.api.metrics import render

    return render


async def config(services: Services, ask: Ask) -> web.StreamResponse:
    """The configuration and the limits that are in force."""
    settings = services.settings
    document = settings.config.model_dump(mode="json", exclude={"limits"})
    return reply(schemas.Configuration(file=os.fspath(settings.file), config=document, limits=services.limits.values(), at_restart=list(settings.at_restart)))


async def stop(services: Services, ask: Ask) -> web.StreamResponse:
    """End the daemon: at once, but in order."""
    now = ask.body_as(schemas.StopBody).now
    running = sum(call.status is Status.IN_PROGRESS for call in views.live(services, ask.peer))
    services.stop(now)
    return reply(schemas.Stopping(pid=os.getpid(), now=now, running=running))


async def drain(services: Services, ask: Ask) -> web.StreamResponse:
    """Let nothing new begin. What runs goes on; durable jobs wait, or are refused if that is asked for."""
    body = ask.body_as(schemas.DrainBody)
    engine = services.engine
    await asyncio.to_thread(engine.gate.close, Drain(services.clock.wall(), body.refuse, body.why))
    services.direct.drain()
    engine.drain()
    log.info("drained by uid %d", ask.peer.uid)
    return reply(_drained(services))


async def drained(services: Services, ask: Ask) -> web.StreamResponse:
    """Whether nothing new begins, and how much of what had begun is left."""
    return reply(_drained(services))


async def resume(services: Services, ask: Ask) -> web.StreamResponse:
    """The end of a drain: what waited begins."""
    found = _drained(services)
    services.engine.resume()
    log.info("resumed by uid %d", ask.peer.uid)
    return reply(found)


def _drained(services: Services) -> schemas.Drained:
    calls = [call for runner in (services.jobs, services.direct) for call in runner.calls.values()]
    running = sum(call.status is Status.IN_PROGRESS or call.worker is not None for call in calls)
    return schemas.Drained(drain=_drain(services), running=running, held=len(services.engine.gate.held))


def _drain(services: Services) -> schemas.Drain | None:
    found = services.engine.gate.drain
    return schemas.Drain(since=found.since, refuses=found.refuses, why=found.why) if found is not None else None
