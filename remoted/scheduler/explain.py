"""Why a call waits, in the words that its owner sees."""

from __future__ import annotations

from remoted.model import Reason
from remoted.scheduler.ledger import Ledger
from remoted.scheduler.matching import GpuRequest
from remoted.scheduler.state import Lane

_Explanation = tuple[Reason, tuple[str, ...]]


class Explanations:
    """Of devices: the same for all lanes of one request, until a device is lent, given back or seen anew."""

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._version = -1
        self._found: dict[GpuRequest, _Explanation] = {}

    def explain_devices(self, lane: Lane) -> None:
        request = lane.need.gpu
        assert request is not None
        if self._version != self._ledger.version:
            self._version = self._ledger.version
            self._found.clear()
        found = self._found.get(request)
        if found is None:
            found = self._found[request] = self._explain(request)
        lane.reason, lane.about = found

    def _explain(self, request: GpuRequest) -> _Explanation:
        ledger = self._ledger
        if ledger.problem:
            return Reason.WAITING_GPU, (ledger.problem,)
        suitable = ledger.suitable(request)
        taken = [uuid for uuid in suitable if uuid in ledger.foreign]
        if taken and len(suitable) - len(taken) < request.count:
            return Reason.FOREIGN_GPU_USE, tuple(f"{uuid} is used by pid {ledger.foreign[uuid][0]}" for uuid in taken)
        holders = sorted({ledger.holders[uuid] for uuid in suitable if uuid in ledger.holders})
        if holders:
            return Reason.WAITING_GPU, tuple(holders)
        return Reason.WAITING_GPU, ("no device is free" if suitable else "no device that could serve it is here now",)


def explain_cpus(lane: Lane, cpus: float) -> None:
    lane.wait(Reason.WAITING_CPU, f"{lane.cpus:g} of {cpus:g} CPUs")


def explain_quota(lane: Lane, most: float) -> None:
    lane.wait(Reason.WAITING_QUOTA, f"your limit running_jobs is {most:g}")


def explain_instance(lane: Lane) -> None:
    lane.wait(Reason.WAITING_INSTANCE, "its worker is busy")


def explain_environment(lane: Lane) -> None:
    lane.wait(Reason.WAITING_ENV, lane.need.environment or "")


def explain_start(lane: Lane) -> None:
    """A worker that starts will serve it."""
    lane.wait(Reason.STARTING, *lane.kind.starting)


def explain_pool(lane: Lane, most: int) -> None:
    lane.wait(Reason.WAITING_WORKER, f"{most} of {most} workers are busy")


def explain_host(lane: Lane, most: int) -> None:
    lane.wait(Reason.WAITING_WORKER, f"the host has its {most} workers")


def explain_reserve(lane: Lane, reserve: int, most: int, few: int) -> None:
    lane.wait(Reason.WAITING_WORKER, f"the last {reserve} of this host's {most} workers are for users who have fewer than {few} (limit workers_reserved)")
