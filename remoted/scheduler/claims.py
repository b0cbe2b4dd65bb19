"""Claims: what the oldest ticket that needs several devices or CPUs at once keeps from all others."""

from __future__ import annotations

from collections.abc import Iterable

from remoted.model import DeviceUuid, WorkerId
from remoted.scheduler.changes import Changes
from remoted.scheduler.fleet import Fleet
from remoted.scheduler.ledger import Ledger
from remoted.scheduler.state import Lane, Need

_NONE: frozenset[DeviceUuid] = frozenset()


class Claims:
    """One lane claims devices, and one (perhaps the same) claims CPUs."""

    def __init__(self, fleet: Fleet, ledger: Ledger, changes: Changes, patience: float) -> None:
        self._fleet = fleet
        self._ledger = ledger
        self._changes = changes
        self._patience = patience
        self._devices_for: Lane | None = None
        self._devices = _NONE
        self._cpus_for: Lane | None = None

    def renew(self, lanes: Iterable[Lane], now: float) -> None:
        """The oldest impatient lanes claim all that they need; a lane claims nothing where an older one claims a part."""
        impatient = [lane for lane in lanes if lane.blocked_since is not None and now - lane.blocked_since >= self._patience]
        if not impatient:
            self._set(None, _NONE, None)
            return
        devices_for: Lane | None = None
        devices = _NONE
        cpus_for: Lane | None = None
        for lane in sorted(impatient, key=_age):
            wants_devices = lane.need.gpu is not None
            if (lane.cpus and cpus_for is not None) or (wants_devices and devices):
                continue
            claimed = self._claimable(lane.need) if wants_devices else _NONE
            if wants_devices and not claimed:
                continue
            cpus_for = lane if lane.cpus else cpus_for
            if claimed:
                devices_for, devices = lane, claimed
        self._set(devices_for, devices, cpus_for)

    def drop(self, lane: Lane) -> None:
        """It has what it claimed, or something as good."""
        if lane is self._devices_for:
            self._set(None, _NONE, self._cpus_for)
        if lane is self._cpus_for:
            self._set(self._devices_for, self._devices, None)

    def barred(self, lane: Lane) -> frozenset[DeviceUuid]:
        """Devices that this lane may not have."""
        return self._devices if lane is not self._devices_for else _NONE

    def barred_cpus(self, lane: Lane) -> float:
        return self._cpus_for.cpus if self._cpus_for is not None and lane is not self._cpus_for else 0.0

    def _set(self, devices_for: Lane | None, devices: frozenset[DeviceUuid], cpus_for: Lane | None) -> None:
        if devices_for is not self._devices_for or devices != self._devices:
            self._changes.in_devices()
        if cpus_for is not self._cpus_for:
            self._changes.in_cpus()
        self._devices_for, self._devices, self._cpus_for = devices_for, devices, cpus_for

    def _claimable(self, need: Need) -> frozenset[DeviceUuid]:
        """The devices of the best alternative that will come free soonest; none while strangers make it impossible."""
        assert need.gpu is not None
        for group in self._ledger.groups(need.gpu):
            usable = sorted(filter(self._ledger.is_usable, group), key=self._is_busy)
            if len(usable) >= need.gpu.count:
                return frozenset(usable[: need.gpu.count])
        return _NONE

    def _is_busy(self, uuid: DeviceUuid) -> bool:
        holder = self._fleet.workers.get(self._ledger.holders.get(uuid, WorkerId("")))
        return holder is not None and bool(holder.running)


def _age(lane: Lane) -> tuple[float, tuple[int, int]]:
    assert lane.blocked_since is not None
    return lane.blocked_since, lane.rank
