"""The daemon as a whole: version, status, configuration, health."""

from __future__ import annotations

import asyncio
import logging
import os
import resource
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

from aiohttp import web

import remoted
from remoted.access import Rule
from remoted.api import devices, others, schemas, views, workers
from remoted.api.exchange import Ask, reply
from remoted.api.services import Services
from remoted.errors import StoreError
from remoted.gate import Drain
from remoted.model import Status
from remoted.paths import filesystem_type
from remoted_client import wire

log = logging.getLogger(__name__)
_API = 1
_LAG_SECONDS = 1.0


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
            counts=_counts(services, [call.status for call in calls.values()]),
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


def _counts(services: Services, statuses: list[Status]) -> schemas.Counts:
    scheduler = services.engine.scheduler
    return schemas.Counts(
        queued=statuses.count(Status.IN_QUEUE),
        running=statuses.count(Status.IN_PROGRESS),
        workers=len(scheduler.workers),
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


async def doctor(services: Services, ask: Ask) -> web.StreamResponse:
    """What only the daemon can check of this host; `remotectl doctor` adds what anybody can."""
    checks = [_check_state(services), _check_gpus(services), _check_disk(services), _check_descriptors(services), *_check_house(services), _check_lag(services), await _check_store(services, ask)]
    return reply(schemas.Doctor(checks=checks))


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


def _check_state(services: Services) -> schemas.Check:
    folder = services.paths.state
    return schemas.Check(name="state", ok=True, detail=f"{folder} on {filesystem_type(folder) or 'an unknown file system'}", advice="")


def _check_house(services: Services) -> list[schemas.Check]:
    """Of the system's daemon: are workers limited, and can users' environments be built?"""
    if services.mode != "system":
        return []
    groups = services.engine.cradle.cgroups
    missing = ("any place for groups",) if groups is None else groups.missing
    detail = f"missing: {', '.join(missing)}" if missing else "memory, CPU and tasks of each worker are limited"
    limits = schemas.Check(name="cgroups", ok=not missing, detail=detail, advice="in a container they must be delegated to it" if missing else "")
    closed = [folder for folder in (Path(sys.executable), *Path(os.path.realpath(sys.executable)).parents) if not folder.stat().st_mode & 0o001]
    detail = f"{closed[0]} is closed to users" if closed else f"{sys.executable} is everybody's to execute"
    python = schemas.Check(name="interpreter", ok=not closed, detail=detail, advice="`dependencies=` fails for users: run the daemon from a Python that they may execute" if closed else "")
    enforced = services.engine.cradle.rules is not None
    detail = "a worker opens no card but its own: the kernel refuses the others" if enforced else "advisory: a worker is told its cards by CUDA_VISIBLE_DEVICES, and can open others"
    devices = schemas.Check(name="gpu access", ok=enforced, detail=detail, advice="" if enforced else "it needs cgroup v2 (at least beside v1), Linux 4.15 and CAP_BPF; or [gpu] enforce is off")
    return [limits, python, devices]


def _check_gpus(services: Services) -> schemas.Check:
    known = services.engine.devices
    detail = known.problem or ", ".join(f"{device.name} ({device.uuid})" for device in known.known) or "no GPU is known"
    advice = "" if known.known and not known.problem else "see whether `nvidia-smi` lists your GPUs; CPU functions run without"
    return schemas.Check(name="gpus", ok=not known.problem, detail=detail, advice=advice)


def _check_disk(services: Services) -> schemas.Check:
    free, reserve = shutil.disk_usage(services.paths.state).free, services.limits.free_disk_reserve_bytes
    detail = f"{free / 1e9:.1f} GB are free below {services.paths.state}; {reserve / 1e6:.0f} MB stay reserved"
    roomy = free > 2 * reserve
    return schemas.Check(name="disk", ok=roomy, detail=detail, advice="" if roomy else "free some space: new jobs will be refused")


def _check_descriptors(services: Services) -> schemas.Check:
    """Two sockets may be full, and every worker takes some ten descriptors."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = 2 * services.limits.connections_total + 256
    fits = soft == resource.RLIM_INFINITY or soft >= wanted
    advice = "" if fits else f"raise the limit of open files above {wanted} (ulimit -n), or lower connections_total"
    return schemas.Check(name="descriptors", ok=fits, detail=f"the daemon may open {soft} files", advice=advice)


def _check_lag(services: Services) -> schemas.Check:
    """Everybody's calls wait while the loop is held."""
    worst = services.lag.worst_seconds
    fine = worst < _LAG_SECONDS
    advice = "" if fine else "the machine is short of CPU, or something holds the daemon: look at its log"
    return schemas.Check(name="event loop", ok=fine, detail=f"at most {worst * 1000:.0f} ms late in the last minute", advice=advice)


async def _check_store(services: Services, ask: Ask) -> schemas.Check:
    """A whole transaction, as every submission needs one."""
    began = services.clock.monotonic()
    try:
        await services.jobs.records.rows(ask.peer, False, 1)
    except StoreError as error:
        return schemas.Check(name="database", ok=False, detail=str(error), advice="free some space, and look at the daemon's log")
    took = services.clock.monotonic() - began
    return schemas.Check(name="database", ok=True, detail=f"a transaction took {took * 1000:.1f} ms", advice="")
