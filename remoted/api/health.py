"""What only the daemon can check of this host; ``remotectl doctor`` adds what anybody can."""

from __future__ import annotations

import os
import resource
import shutil
import sys
from pathlib import Path

from aiohttp import web

from remoted.access import Rule
from remoted.api import schemas
from remoted.api.exchange import Ask, reply
from remoted.api.services import Services
from remoted.errors import StoreError
from remoted.paths import filesystem_type

_LAG_SECONDS = 1.0


async def doctor(services: Services, ask: Ask) -> web.StreamResponse:
    """Everybody may know how functions are kept apart here; folders and loads of the host are an administrator's."""
    checks = [_check_gpus(services), *_check_isolation(services), _check_lag(services)]
    if services.jobs.access.allows(Rule.ADMIN, ask.peer):
        checks += [_check_state(services), _check_disk(services), _check_descriptors(services), await _check_store(services, ask)]
    return reply(schemas.Doctor(checks=checks))


def _check_state(services: Services) -> schemas.Check:
    folder = services.paths.state
    return schemas.Check(name="state", ok=True, detail=f"{folder} on {filesystem_type(folder) or 'an unknown file system'}", advice="")


def _check_isolation(services: Services) -> list[schemas.Check]:
    """What keeps workers apart: limits, cards, and whether users' environments can be built."""
    if services.mode != "system":
        detail = "user mode: the GPU pool is advisory (other programs may use the GPUs too), limits are rlimits and not cgroups"
        return [schemas.Check(name="isolation", ok=True, detail=detail, advice="")]
    return [_check_groups(services), _check_interpreter(), _check_devices(services)]


def _check_groups(services: Services) -> schemas.Check:
    groups = services.engine.cradle.cgroups
    missing = ("any place for groups",) if groups is None else groups.missing
    detail = f"missing: {', '.join(missing)}" if missing else "memory, CPU and tasks of each worker are limited"
    return schemas.Check(name="cgroups", ok=not missing, detail=detail, advice="in a container they must be delegated to it" if missing else "")


def _check_interpreter() -> schemas.Check:
    closed = [folder for folder in (Path(sys.executable), *Path(os.path.realpath(sys.executable)).parents) if not folder.stat().st_mode & 0o001]
    detail = f"{closed[0]} is closed to users" if closed else f"{sys.executable} is everybody's to execute"
    return schemas.Check(name="interpreter", ok=not closed, detail=detail, advice="`dependencies=` fails for users: run the daemon from a Python that they may execute" if closed else "")


def _check_devices(services: Services) -> schemas.Check:
    """Advice only where there is something to keep apart."""
    enforced = services.engine.cradle.rules is not None
    detail = "a worker opens no card but its own: the kernel refuses the others" if enforced else "advisory: a worker is told its cards by CUDA_VISIBLE_DEVICES, and can open others"
    fine = enforced or not services.engine.devices.known
    return schemas.Check(name="gpu access", ok=fine, detail=detail, advice="" if fine else "it needs cgroup v2 (at least beside v1), Linux 4.15 and CAP_BPF; or [gpu] enforce is off")


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
    wanted = 2 * (services.limits.connections_total + services.limits.connections_reserve) + 256
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
