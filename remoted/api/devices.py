"""GPUs: what they are, who holds them, and who uses them from outside."""

from __future__ import annotations

import asyncio
import contextlib
import math
from pathlib import Path

from aiohttp import web

from remoted.access import Peer
from remoted.api import others, schemas
from remoted.api.exchange import Ask, reply
from remoted.api.services import Services
from remoted.config import Seen
from remoted.engine import Engine
from remoted.model import Device, DeviceUse, DeviceUuid, WorkerId

#: A status must answer within 100 ms, whatever a driver does; facts younger than this are shown as they are.
_LOOK_SECONDS = 0.05
_FRESH_SECONDS = 0.2


async def gpus(services: Services, ask: Ask) -> web.StreamResponse:
    """Every GPU of the host, its holder and its foreign processes, those that only draw a desktop included."""
    await refresh(services)
    found = await views(services, ask.peer)
    return reply(schemas.Gpus(gpus=found, problem=services.engine.devices.problem, seen_at=seen_at(services)))


async def refresh(services: Services) -> None:
    """Look at the devices again if that is quick; the look itself goes on when it is not."""
    engine = services.engine
    if not engine.devices.known or services.clock.monotonic() - engine.devices.seen_at < _FRESH_SECONDS:
        return
    seen = asyncio.Event()
    engine.spawn(_look(engine, seen))
    with contextlib.suppress(asyncio.TimeoutError):
        await asyncio.wait_for(seen.wait(), _LOOK_SECONDS)


async def _look(engine: Engine, seen: asyncio.Event) -> None:
    try:
        await engine.look_at_devices()
    finally:
        seen.set()


def seen_at(services: Services) -> float | None:
    """When the driver was last asked, in Unix seconds."""
    moment = services.engine.devices.seen_at
    if math.isinf(moment):
        return None
    return services.clock.wall() - (services.clock.monotonic() - moment)


async def views(services: Services, peer: Peer) -> list[schemas.Gpu]:
    devices = services.engine.devices
    uses = {use.uuid: use for use in devices.uses}
    strangers = {
        device.uuid: pids for device in devices.known if (pids := devices.foreign.get(device.uuid, ()) + devices.desktop.get(device.uuid, ()))
    }
    foreign = await asyncio.to_thread(_describe_all, strangers, uses) if strangers else {}
    return [_view(services, peer, device, uses.get(device.uuid), foreign.get(device.uuid, [])) for device in devices.known]


def _view(services: Services, peer: Peer, device: Device, use: DeviceUse | None, foreign: list[schemas.ForeignProcess]) -> schemas.Gpu:
    capability, ledger = device.compute_capability, services.engine.scheduler.ledger
    return schemas.Gpu(
        uuid=device.uuid,
        index=device.index,
        minor=device.minor,
        name=device.name,
        memory_bytes=device.memory_bytes,
        memory_used_bytes=use.memory_used_bytes if use else None,
        utilization_percent=use.utilization_percent if use else None,
        compute_capability=f"{capability[0]}.{capability[1]}" if capability else "",
        free=ledger.is_free(device.uuid),
        holder=_holder(services, peer, ledger.holders.get(device.uuid)),
        foreign=foreign,
    )


def _holder(services: Services, peer: Peer, worker_id: WorkerId | None) -> schemas.Holder | None:
    """That a device is taken everybody sees; by which user and in which pool as far as users see one another."""
    view = services.engine.scheduler.workers.get(worker_id) if worker_id else None
    if view is None:
        return None
    if view.need.uid != peer.uid and not others.administers(services, peer):
        seen = others.seen(services, peer)
        pool = view.need.pool[2] if seen is Seen.WORK else ""
        return schemas.Holder(worker="", pool=pool, uid=view.need.uid, jobs=[]) if seen is not Seen.NOTHING else None
    return schemas.Holder(worker=view.id, pool=view.need.pool[2], uid=view.need.uid, jobs=list(view.running))


def _describe_all(
    foreign: dict[DeviceUuid, tuple[int, ...]], uses: dict[DeviceUuid, DeviceUse]
) -> dict[DeviceUuid, list[schemas.ForeignProcess]]:
    found: dict[DeviceUuid, list[schemas.ForeignProcess]] = {}
    for uuid, pids in foreign.items():
        used = {process.pid: process.used_bytes for process in uses[uuid].processes} if uuid in uses else {}
        found[uuid] = [_describe(pid, used.get(pid)) for pid in pids]
    return found


def _describe(pid: int, used_bytes: int | None) -> schemas.ForeignProcess:
    """What /proc shows to everybody; never its command line, which may hold a secret (T40)."""
    folder = Path(f"/proc/{pid}")
    try:
        uid: int | None = folder.stat().st_uid
        command = (folder / "comm").read_text(encoding="utf-8", errors="replace").strip()
    except OSError:
        uid, command = None, ""
    return schemas.ForeignProcess(pid=pid, uid=uid, command=command, used_bytes=used_bytes)
