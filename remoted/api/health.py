"""What only the daemon can check of this host; ``remotectl doctor`` adds what anybody can."""

from __future__ import annotations

import asyncio
import os
import resource
import shutil
import stat
import sys
from collections.abc import Collection

from aiohttp import web

from remoted import config_files
from remoted.access import Rule
from remoted.api import schemas
from remoted.api.exchange import Ask, reply
from remoted.api.services import Services
from remoted.cgroup import CONTROLLERS
from remoted.config_files import Reading
from remoted.errors import StoreError
from remoted.limits import size_text
from remoted.paths import filesystem_type
from remoted.settings import Settings
from remoted.trust import closed_to_others

_LAG_SECONDS = 1.0
#: What each controller limits.
_LIMITED = {"memory": "memory", "cpu": "CPU", "pids": "tasks"}


async def doctor(services: Services, ask: Ask) -> web.StreamResponse:
    """Everybody may know how functions are kept apart here; folders and loads of the host are an administrator's."""
    checks = [_check_gpus(services), *await _check_isolation(services), _check_lag(services)]
    if services.jobs.access.allows(Rule.ADMIN, ask.peer):
        checks += [_check_state(services), _check_disk(services), await _check_configuration(services), _check_descriptors(services), await _check_store(services, ask)]
    return reply(schemas.Doctor(checks=checks))


def _check_state(services: Services) -> schemas.Check:
    folder = services.paths.state
    return schemas.Check(name="state", ok=True, detail=f"{folder} on {filesystem_type(folder) or 'an unknown file system'}", advice="")


async def _check_isolation(services: Services) -> list[schemas.Check]:
    """What keeps workers apart: limits, cards, and whether users' environments can be built."""
    if services.mode != "system":
        detail = "user mode: the GPU pool is advisory (other programs may use the GPUs too), limits are rlimits and not cgroups"
        return [schemas.Check(name="isolation", ok=True, detail=detail, advice="")]
    return [await _check_groups(services), _check_interpreter(), _check_program(services), _check_devices(services)]


async def _check_groups(services: Services) -> schemas.Check:
    """By what the kernel has for the workers that live: systemd takes a limit, and says nothing where it cannot set it."""
    groups = services.engine.cradle.cgroups
    families = [worker.family for worker in services.engine.workers.values()]
    unbounded = await asyncio.to_thread(lambda: frozenset[str]().union(*(family.group.unbounded(family.bounds) for family in families if family.group is not None)))
    return check_groups(CONTROLLERS if groups is None else {*groups.missing, *unbounded})


def check_groups(missing: Collection[str]) -> schemas.Check:
    """``missing``: controllers by which workers are not limited."""
    if not missing:
        return schemas.Check(name="cgroups", ok=True, detail="memory, CPU and tasks of each worker are limited", advice="")
    nouns = [noun for name, noun in _LIMITED.items() if name in missing]
    detail = f"the kernel does not limit {_list(nouns)} of workers: {_list(list(missing))} of cgroups {'is' if len(missing) == 1 else 'are'} not handed to the daemon"
    fallback = "; meanwhile memory is a limit of each single process, where a config asks for one" if "memory" in missing else ""
    return schemas.Check(name="cgroups", ok=False, detail=detail, advice=f"in a container, have its controllers delegated to it (best with cgroup version 2 on the host){fallback}")


def _list(words: list[str]) -> str:
    return " and ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


def _check_interpreter() -> schemas.Check:
    closed = closed_to_others([sys.executable])
    detail = f"{sys.executable} is not everybody's to execute: {closed} is closed to users" if closed else f"{sys.executable} is everybody's to execute"
    advice = f"`remotectl` and `dependencies=` fail for users: chmod o+x {closed}, or run the daemon from a Python that they may execute" if closed else ""
    return schemas.Check(name="interpreter", ok=not closed, detail=detail, advice=advice)


def _check_program(services: Services) -> schemas.Check:
    """Workers run it as their users."""
    folder = services.paths.runtime
    closed = closed_to_others([folder])
    unread = [path for path in folder.glob("*.pyz") if not path.stat().st_mode & stat.S_IROTH]
    detail = f"{closed or unread[0]} is closed to users: no new worker can start" if closed or unread else f"what lies in {folder} is everybody's to read"
    repair = f"chmod o+x {closed}" if closed else f"chmod o+r {unread[0]}" if unread else ""
    return schemas.Check(name="worker program", ok=not repair, detail=detail, advice=f"run: {repair}" if repair else "")


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
    detail = f"{size_text(free)} are free on the disk that holds {services.paths.state}; {size_text(reserve)} of it stay reserved"
    roomy = free > 2 * reserve
    advice = "" if roomy else "free some space: new jobs are refused" if free <= reserve else "free some space: new jobs will be refused soon"
    return schemas.Check(name="disk", ok=roomy, detail=detail, advice=advice)


async def _check_configuration(services: Services) -> schemas.Check:
    """What the files say now, against what is in force: a reload that failed, or that nobody asked for, leaves a difference."""
    reading = await asyncio.to_thread(config_files.read, services.settings.file, services.mode == "system")
    return configuration_check(reading, services.settings, "systemctl reload remoted" if services.mode == "system" else f"kill -HUP {os.getpid()}")


def configuration_check(reading: Reading, settings: Settings, reload: str) -> schemas.Check:
    """``reload``: the command for it."""
    name = "configuration"
    if reading.fatal:
        first, *others = reading.fatal
        more = f" (and {len(others)} more)" if others else ""
        return schemas.Check(name=name, ok=False, detail=f"{first}{more}; what was read before stays in force", advice="the next start will fail: see `remotectl config check`")
    waiting = settings.differences(reading)
    if waiting.live:
        return schemas.Check(name=name, ok=True, warning=True, detail=f"not in force as the files say it: {', '.join((*waiting.live, *waiting.at_restart))}", advice=f"run: {reload}")
    if waiting.at_restart:
        return schemas.Check(name=name, ok=True, warning=True, detail=f"changes at the next start only: {', '.join(waiting.at_restart)}", advice="a restart harms no running job")
    if reading.problems:
        return schemas.Check(name=name, ok=True, warning=True, detail=str(reading.problems[0]), advice="see `remotectl config check`")
    there = ", ".join(map(str, reading.files)) or f"{reading.file} is not there, so the defaults hold"
    return schemas.Check(name=name, ok=True, detail=f"{there}: in force" if reading.files else there, advice="")


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
    if not services.jobs.records.is_in_place:
        detail = f"{services.paths.database} was removed or replaced while the daemon writes to it: what is stored now is lost at its next start"
        return schemas.Check(name="database", ok=False, detail=detail, advice="let what there is end first (`remotectl drain --wait`, which takes nothing new), then restart the daemon")
    return schemas.Check(name="database", ok=True, detail=f"a transaction took {took * 1000:.1f} ms", advice="")
