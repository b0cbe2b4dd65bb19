"""What is known of the host's GPUs at one moment."""

from __future__ import annotations

from dataclasses import dataclass, field

from remoted.model import Device, DeviceUse, DeviceUuid


@dataclass
class Devices:
    """The newest facts about the host's GPUs."""

    known: tuple[Device, ...] = ()
    uses: tuple[DeviceUse, ...] = ()
    foreign: dict[DeviceUuid, tuple[int, ...]] = field(default_factory=dict)
    #: Processes that draw a desktop: shown, and no reason to keep a device back.
    desktop: dict[DeviceUuid, tuple[int, ...]] = field(default_factory=dict)
    #: The newest CUDA that the driver can run.
    cuda: tuple[int, int] | None = None
    seen_at: float = float("-inf")
    problem: str = ""

    def cards(self, devices: tuple[DeviceUuid, ...]) -> tuple[int, ...] | None:
        """Minor numbers of these, as in /dev/nvidiaN; None where the driver does not tell one of them."""
        minors = [device.minor for device in self.known if device.uuid in devices]
        return tuple(minor for minor in minors if minor is not None) if None not in minors and len(minors) == len(devices) else None
