"""The nouns of remoted: jobs, attempts, workers, devices and their legal states.

This module is the glossary in code. It holds frozen data only: no I/O, no clock, no behaviour beyond a
look-up. Every floor above may import it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import NewType

from remoted_client.wire import Status as Status

JobId = NewType("JobId", str)
WorkerId = NewType("WorkerId", str)
AttemptToken = NewType("AttemptToken", str)
Uid = NewType("Uid", int)
DeviceUuid = NewType("DeviceUuid", str)


class Reason(str, Enum):
    """Why a job waits or how it died: the ``state_reason`` beside the status."""

    WAITING_GPU = "WAITING_GPU"
    WAITING_CPU = "WAITING_CPU"
    WAITING_WORKER = "WAITING_WORKER"
    WAITING_ENV = "WAITING_ENV"
    WAITING_TURN = "WAITING_TURN"
    WAITING_RETRY = "WAITING_RETRY"
    WAITING_INSTANCE = "WAITING_INSTANCE"
    WAITING_QUOTA = "WAITING_QUOTA"
    DRAINED = "DRAINED"
    STARTING = "STARTING"
    FOREIGN_GPU_USE = "FOREIGN_GPU_USE"
    EXCEPTION = "EXCEPTION"
    EXITED = "EXITED"
    TIMEOUT = "TIMEOUT"
    CANCELLED = "CANCELLED"
    CALLER_GONE = "CALLER_GONE"
    PARENT_ENDED = "PARENT_ENDED"
    DAEMON_STOPPED = "DAEMON_STOPPED"
    ADMINISTRATOR = "ADMINISTRATOR"
    OOM_RAM = "OOM_RAM"
    OOM_GPU = "OOM_GPU"
    WORKER_DIED = "WORKER_DIED"
    WORKER_START_FAILED = "WORKER_START_FAILED"
    UNKNOWN_USER = "UNKNOWN_USER"
    RESULT_LOST = "RESULT_LOST"
    LOST = "LOST"
    ENVIRONMENT = "ENVIRONMENT"
    WOULD_DEADLOCK = "WOULD_DEADLOCK"


@dataclass(frozen=True, slots=True)
class Device:
    """One GPU (or MIG slice) as a fact of the host. Its identity is the UUID, never the index."""

    uuid: DeviceUuid
    #: Position in NVML's list; for display only, it may change at the next boot.
    index: int
    #: N of /dev/nvidiaN (nvmlDeviceGetMinorNumber); None where the driver does not say.
    minor: int | None
    name: str
    memory_bytes: int
    #: (major, minor), e.g. (8, 6) for an RTX 3090; None where the driver does not say.
    compute_capability: tuple[int, int] | None


@dataclass(frozen=True, slots=True)
class DeviceProcess:
    """One process that NVML reports on a device. ``used_bytes`` is None where the driver hides it."""

    pid: int
    used_bytes: int | None
    #: It draws and does not compute: in NVML's graphics list and not in its compute list.
    graphics_only: bool = False


@dataclass(frozen=True, slots=True)
class DeviceUse:
    """What is happening on one device at one moment."""

    uuid: DeviceUuid
    memory_used_bytes: int | None
    utilization_percent: int | None
    processes: tuple[DeviceProcess, ...] = field(default=())
