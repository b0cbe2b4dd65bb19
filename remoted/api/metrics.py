"""The daemon's numbers in the text format of Prometheus. The only importer of its library; imported at the first scrape.

No label holds what a user named or wrote: kinds, statuses, reasons and codes are the daemon's words, devices are
the host's. Series by uid are added for an administrator only.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, InfoMetricFamily
from prometheus_client.exposition import generate_latest
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

import remoted
from remoted.api.services import Services
from remoted.calls import Call
from remoted.leases import Lease
from remoted.model import Status
from remoted.scheduler.state import WorkerState
from remoted.tally import OTHERS, Histogram

_process = ProcessCollector(registry=None)


class _Families(Collector):
    def __init__(self, families: Iterable[Metric]) -> None:
        self._families = families

    def collect(self) -> Iterable[Metric]:
        return self._families


def render(services: Services, by_user: bool) -> bytes:
    """Everything; ``by_user``: with the series by uid."""
    families = [*_daemon(services), *_calls(services), *_workers(services), *_devices(services), *_process.collect()]
    return generate_latest(_Families([*families, *(_users(services) if by_user else ())]))


def _daemon(services: Services) -> Iterator[Metric]:
    tally, commits = services.tally, services.jobs.records.commits
    yield InfoMetricFamily("remoted_build", "What runs", {"version": remoted.__version__, "mode": services.mode})
    yield _gauge("remoted_uptime_seconds", "Since this daemon began to serve", services.clock.monotonic() - services.started_at)
    yield _gauge("remoted_draining", "1 while nothing new begins", float(services.engine.gate.is_closed))
    yield _gauge("remoted_event_loop_lag_seconds", "By how much the event loop was late just now", services.lag.newest_seconds)
    yield _gauge("remoted_event_loop_lag_worst_seconds", "By how much it was late at most in the last minute", services.lag.worst_seconds)
    seconds = HistogramMetricFamily("remoted_store_commit_seconds", "Transactions of the database, the disk's fsync included", labels=())
    seconds.add_metric([], *_buckets(commits))
    yield seconds
    refusals = CounterMetricFamily("remoted_refusals", "What was refused, by the code that the caller got", labels=("code",))
    for code, count in sorted(tally.refused.items()):
        refusals.add_metric([code], count)
    yield refusals
    connections = GaugeMetricFamily("remoted_connections", "Open connections", labels=("door",))
    for door, inside in tally.connections.items():
        connections.add_metric([door], inside.total())
    yield connections


def _calls(services: Services) -> Iterator[Metric]:
    ended = CounterMetricFamily("remoted_jobs_ended", "Calls that are over", labels=("kind", "status", "reason"))
    for (kind, status, reason), count in sorted(services.tally.ended.items()):
        ended.add_metric([kind, status.value, reason], count)
    yield ended
    jobs = GaugeMetricFamily("remoted_jobs", "Calls that wait or run now", labels=("kind", "state"))
    now = Counter((kind, call.status) for kind, call in _live(services))
    for kind in ("queue", "direct", "lease"):
        jobs.add_metric([kind, "queued"], now[(kind, Status.IN_QUEUE)])
        jobs.add_metric([kind, "running"], now[(kind, Status.IN_PROGRESS)])
    yield jobs
    yield _by_kind("remoted_job_queue_seconds", "From submission to the first attempt", services.tally.queue_seconds)
    yield _by_kind("remoted_job_run_seconds", "In a worker, all attempts together", services.tally.run_seconds)


def _by_kind(name: str, text: str, found: dict[str, Histogram]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=("kind",))
    for kind, histogram in sorted(found.items()):
        family.add_metric([kind], *_buckets(histogram))
    return family


def _workers(services: Services) -> Iterator[Metric]:
    scheduler = services.engine.scheduler
    workers = GaugeMetricFamily("remoted_workers", "Worker processes", labels=("state",))
    states = Counter(worker.state for worker in scheduler.workers.values())
    for state in WorkerState:
        workers.add_metric([state.value.lower()], states[state])
    yield workers
    yield _gauge("remoted_cpus", "CPUs that this daemon lends", scheduler.cpus)
    yield _gauge("remoted_cpus_reserved", "CPUs that running calls have reserved", scheduler.cpus_used())
    leases = sum(isinstance(call, Lease) and call.status is Status.IN_PROGRESS for call in services.direct.calls.values())
    yield _gauge("remoted_leases", "Connections of clients that a worker serves itself", leases)


def _devices(services: Services) -> Iterator[Metric]:
    devices, ledger = services.engine.devices, services.engine.scheduler.ledger
    held = GaugeMetricFamily("remoted_gpu_held", "1 while a worker holds it", labels=("gpu", "index"))
    foreign = GaugeMetricFamily("remoted_gpu_foreign_processes", "Processes outside of the daemon that use it", labels=("gpu", "index"))
    memory = GaugeMetricFamily("remoted_gpu_memory_bytes", "Its memory", labels=("gpu", "index"))
    used = GaugeMetricFamily("remoted_gpu_memory_used_bytes", "Its memory in use, by whomever", labels=("gpu", "index"))
    busy = GaugeMetricFamily("remoted_gpu_utilization_ratio", "How much of the time it computed", labels=("gpu", "index"))
    uses = {use.uuid: use for use in devices.uses}
    for device in devices.known:
        labels = [device.uuid, str(device.index)]
        held.add_metric(labels, float(device.uuid in ledger.holders))
        foreign.add_metric(labels, len(devices.foreign.get(device.uuid, ())) + len(devices.desktop.get(device.uuid, ())))
        memory.add_metric(labels, device.memory_bytes)
        use = uses.get(device.uuid)
        if use is not None and use.memory_used_bytes is not None:
            used.add_metric(labels, use.memory_used_bytes)
        if use is not None and use.utilization_percent is not None:
            busy.add_metric(labels, use.utilization_percent / 100)
    yield from (held, foreign, memory, used, busy)


def _users(services: Services) -> Iterator[Metric]:
    ended = CounterMetricFamily("remoted_user_jobs_ended", "Calls of one user that are over", labels=("uid", "status"))
    for (uid, status), count in sorted(services.tally.ended_of.items()):
        ended.add_metric(["others" if uid == OTHERS else str(uid), status.value], count)
    yield ended
    jobs = GaugeMetricFamily("remoted_user_jobs", "Calls of one user that wait or run now", labels=("uid", "state"))
    for (uid, status), count in sorted(Counter((call.uid, call.status) for _, call in _live(services)).items()):
        jobs.add_metric([str(uid), "running" if status is Status.IN_PROGRESS else "queued"], count)
    yield jobs
    connections = GaugeMetricFamily("remoted_user_connections", "Open connections of one user", labels=("uid", "door"))
    for door, inside in services.tally.connections.items():
        for uid, count in sorted(inside.items()):
            connections.add_metric([str(uid), door], count)
    yield connections


def _live(services: Services) -> Iterator[tuple[str, Call]]:
    """With their kinds, as ``Ending`` has them."""
    yield from (("queue", call) for call in services.jobs.calls.values())
    yield from (("lease" if isinstance(call, Lease) else "direct", call) for call in services.direct.calls.values())


def _gauge(name: str, text: str, value: float) -> Metric:
    return GaugeMetricFamily(name, text, value)


def _buckets(histogram: Histogram) -> tuple[list[tuple[str, float]], float]:
    bounds = [*map(str, histogram.bounds), "+Inf"]
    return list(zip(bounds, map(float, histogram.cumulative), strict=True)), histogram.sum
