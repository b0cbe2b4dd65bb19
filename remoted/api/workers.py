"""Workers, fork servers and pools as their owner sees them."""

from __future__ import annotations

import asyncio
from collections import Counter
from math import inf

from aiohttp import web

from remoted.access import Peer
from remoted.api import schemas
from remoted.api.exchange import Ask, reply
from remoted.api.services import Services
from remoted.family import count_leftovers
from remoted.scheduler.state import PoolKey, PoolPolicy, WorkerState, WorkerView
from remoted.spawn.footprint import Footprint, Footprints
from remoted.spawn.forkserver import ForkServer

_footprints = Footprints()


async def workers(services: Services, ask: Ask) -> web.StreamResponse:
    """Every worker of yours: what it does, and until when it stays idle."""
    found, servers = await views(services, ask.peer)
    return reply(schemas.Workers(workers=found, fork_servers=servers))


async def views(services: Services, peer: Peer) -> tuple[list[schemas.Worker], list[schemas.ForkServer]]:
    found = [worker for worker in services.engine.scheduler.workers.values() if worker.need.uid == peer.uid]
    servers = [server for server in services.engine.births.servers.values() if server.recipe.uid == peer.uid]
    forked = [process.pid for worker in found if (process := services.engine.workers.get(worker.id)) and process.born_as and process.born_as.server]
    pids = [*(server.pid for server in servers if server.pid), *forked]
    memory = await _footprints.of(peer.uid, pids) if pids else {}
    families = [(process.family, process.begun_since) for worker in found if (process := services.engine.workers.get(worker.id))]
    leftovers = await asyncio.to_thread(count_leftovers, families)
    return [_view(services, worker, memory, leftovers.get(worker.id, 0)) for worker in found], [_server_view(services, server, memory) for server in servers]


def _server_view(services: Services, server: ForkServer, memory: dict[int, Footprint]) -> schemas.ForkServer:
    return schemas.ForkServer(
        id=server.id,
        state=server.state,
        pid=server.pid,
        preload=list(server.recipe.preload),
        inferred=list(server.recipe.hints),
        started_at=server.started_at,
        used_at=to_wall(services, server.used),
        births=server.births,
        memory=_memory(memory.get(server.pid)),
    )


def _memory(found: Footprint | None) -> schemas.Memory | None:
    return schemas.Memory(resident=found.resident, shared=found.shared, private=found.private) if found else None


def _view(services: Services, view: WorkerView, memory: dict[int, Footprint], leftovers: int) -> schemas.Worker:
    process = services.engine.workers.get(view.id)
    hello = process.hello if process else None
    born = process.born_as if process else None
    return schemas.Worker(
        id=view.id,
        pool=view.need.pool[2],
        config_class=view.need.pool[1],
        state=view.state.value,
        pid=process.pid if process else 0,
        python=".".join(map(str, hello.python)) if hello else "",
        gpus=list(view.devices),
        started_at=process.started_at if process else None,
        since=to_wall(services, view.since),
        idle_until=_idle_until(services, view),
        calls_done=process.calls_done if process else 0,
        running=list(view.running),
        start="" if born is None else "forked" if born.server else "plain",
        start_reason=born.reason if born else "",
        fork_server=born.server if born else "",
        memory=_memory(memory.get(process.pid)) if process else None,
        leftovers=leftovers,
    )


def to_wall(services: Services, moment: float) -> float:
    """A moment of the monotonic clock in Unix seconds."""
    return services.clock.wall() + moment - services.clock.monotonic()


def _idle_until(services: Services, view: WorkerView) -> float | None:
    """When it ends if nothing happens; None unless it is idle, and while a process that uses its config keeps it."""
    until = services.engine.scheduler.kept_until(view.id)
    return to_wall(services, until) if until is not None and until < inf else None


def pools(services: Services, peer: Peer) -> list[schemas.Pool]:
    """The pools in use: with workers, with calls that wait, or held."""
    scheduler = services.engine.scheduler
    workers_of: dict[PoolKey, list[WorkerView]] = {}
    for worker in scheduler.workers.values():
        workers_of.setdefault(worker.need.pool, []).append(worker)
    queued = Counter[PoolKey]()
    for lanes in scheduler.users.values():
        for lane in lanes.values():
            queued[lane.need.pool] += len(lane.tickets)
    keys = {*workers_of, *queued, *scheduler.held_until}
    return [_pool(services, key, workers_of.get(key, []), queued[key]) for key in sorted(keys) if key[0] == peer.uid]


def _pool(services: Services, key: PoolKey, members: list[WorkerView], queued: int) -> schemas.Pool:
    scheduler = services.engine.scheduler
    policy = scheduler.policies.get(key, PoolPolicy())
    states = Counter(worker.state for worker in members)
    held = scheduler.held_until.get(key)
    return schemas.Pool(
        config_class=key[1],
        name=key[2],
        workers_min=policy.workers_min,
        workers_max=policy.workers_max,
        idle_timeout_seconds=policy.idle_timeout_seconds,
        workers=len(members),
        idle=states[WorkerState.IDLE],
        busy=states[WorkerState.BUSY],
        queued=queued,
        held=held is not None,
        held_until=to_wall(services, held) if held is not None and held < inf else None,
    )
