"""Who holds which GPU: the lease table, pure. A device used by a process that is not ours is taken."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from remoted.model import Device, DeviceUuid, WorkerId
from remoted.scheduler.matching import GpuRequest, candidates


class Ledger:
    """Exclusive leases of devices by workers. Identity is the UUID; an index may change at any boot."""

    def __init__(self) -> None:
        self.devices: dict[DeviceUuid, Device] = {}
        self.holders: dict[DeviceUuid, WorkerId] = {}
        self.foreign: dict[DeviceUuid, tuple[int, ...]] = {}

    def see(self, devices: Iterable[Device], foreign: Mapping[DeviceUuid, tuple[int, ...]]) -> None:
        """Take the newest facts. A device that vanished stays with its holder until that worker ends."""
        self.devices = {device.uuid: device for device in devices}
        self.foreign = {uuid: pids for uuid, pids in foreign.items() if pids}

    def pick(self, request: GpuRequest) -> tuple[Device, ...] | None:
        """Devices that are free now and serve the request, best first; None if there are not enough."""
        free = [device for device in self.devices.values() if self.is_free(device.uuid)]
        for group in candidates(request, free):
            if len(group) >= request.count:
                return tuple(group[: request.count])
        return None

    def is_free(self, uuid: DeviceUuid) -> bool:
        return uuid not in self.holders and uuid not in self.foreign

    def suitable(self, request: GpuRequest) -> list[DeviceUuid]:
        """Every device that could serve the request if nobody used it, preferred ones first, once each."""
        groups = [group for group in candidates(request, self.devices.values()) if len(group) >= request.count]
        return list(dict.fromkeys(device.uuid for group in groups for device in group))

    def lend(self, worker: WorkerId, devices: Iterable[DeviceUuid]) -> None:
        for uuid in devices:
            if uuid in self.holders:
                raise ValueError(f"cannot lend {uuid} to {worker}: {self.holders[uuid]} holds it")
            self.holders[uuid] = worker

    def give_back(self, worker: WorkerId) -> None:
        self.holders = {uuid: holder for uuid, holder in self.holders.items() if holder != worker}
