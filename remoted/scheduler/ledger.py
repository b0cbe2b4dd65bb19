"""Who holds which GPU: the lease table, pure. A device used by a process that is not ours is taken."""

from __future__ import annotations

from collections.abc import Container, Iterable, Mapping

from remoted.model import Device, DeviceUuid, WorkerId
from remoted.scheduler.matching import GpuRequest, candidates


class Ledger:
    """Exclusive leases of devices by workers. Identity is the UUID; an index may change at any boot."""

    def __init__(self) -> None:
        self.devices: dict[DeviceUuid, Device] = {}
        self.holders: dict[DeviceUuid, WorkerId] = {}
        self.foreign: dict[DeviceUuid, tuple[int, ...]] = {}
        #: Devices that are there, that no stranger uses and nobody holds.
        self.free: set[DeviceUuid] = set()
        #: Grows with every change.
        self.version = 0
        #: Why the driver says nothing; while it is set no device is lent.
        self.problem = ""
        self._groups: dict[GpuRequest, list[tuple[DeviceUuid, ...]]] = {}

    def see(self, devices: Iterable[Device], foreign: Mapping[DeviceUuid, tuple[int, ...]], problem: str = "") -> None:
        """Take the newest facts. A device that vanished stays with its holder until that worker ends."""
        known = {device.uuid: device for device in devices}
        if known != self.devices:
            self.devices = known
            self._groups.clear()
        self.foreign = {uuid: pids for uuid, pids in foreign.items() if pids}
        self.problem = problem
        self._count_free()

    def groups(self, request: GpuRequest) -> list[tuple[DeviceUuid, ...]]:
        """For each alternative that this host can serve at all, the devices of it, the best first."""
        found = self._groups.get(request)
        if found is None:
            tuples = candidates(request, self.devices.values())
            found = [tuple(device.uuid for device in group) for group in tuples if len(group) >= request.count]
            self._groups[request] = found
        return found

    def pick(self, request: GpuRequest, barred: Container[DeviceUuid] = ()) -> tuple[DeviceUuid, ...] | None:
        """Devices that are free now and serve the request, best first; None if there are not enough."""
        if len(self.free) < request.count:
            return None
        for group in self.groups(request):
            free = [uuid for uuid in group if uuid not in barred and uuid in self.free]
            if len(free) >= request.count:
                return tuple(free[: request.count])
        return None

    def is_free(self, uuid: DeviceUuid) -> bool:
        return uuid in self.free

    def is_usable(self, uuid: DeviceUuid) -> bool:
        """It is there, the driver answers for it, and no stranger uses it."""
        return uuid in self.devices and uuid not in self.foreign

    def suitable(self, request: GpuRequest) -> list[DeviceUuid]:
        """Every device that could serve the request if nobody used it, preferred ones first, once each."""
        return list(dict.fromkeys(uuid for group in self.groups(request) for uuid in group))

    def lend(self, worker: WorkerId, devices: Iterable[DeviceUuid]) -> None:
        for uuid in devices:
            if uuid in self.holders:
                raise ValueError(f"cannot lend {uuid} to {worker}: {self.holders[uuid]} holds it")
            self.holders[uuid] = worker
        self._count_free()

    def give_back(self, worker: WorkerId) -> None:
        for uuid in [uuid for uuid, holder in self.holders.items() if holder == worker]:
            del self.holders[uuid]
        self._count_free()

    def _count_free(self) -> None:
        self.free = {uuid for uuid in self.devices if uuid not in self.holders and uuid not in self.foreign}
        self.version += 1
