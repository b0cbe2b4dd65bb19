"""Who else uses a device, and whether that makes it taken.

A card that drives a monitor always has processes on it (Xorg, a compositor, a browser). They draw, need little and leave
the card idle for most of the time, so they are no reason to keep it back; a game or a renderer is. Whoever computes is a
user of the card, however little memory it holds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass

from remoted.model import DeviceProcess, DeviceUse, DeviceUuid

#: What all processes that only draw may hold together on a device that is still lent. Xorg, a compositor and a browser
#: hold 100 to 600 MiB on one or two 4K monitors; a game or a renderer begins above 1 GiB.
DESKTOP_BYTES = 768 << 20

#: More memory in use than this, and no process to show for it: it belongs to somebody whom we cannot see.
_UNEXPLAINED_BYTES = 1 << 30

#: Stands for a process that cannot be seen from here.
UNSEEN = 0


@dataclass(frozen=True, slots=True)
class Strangers:
    """Pids on one device that are not its holder's."""

    #: Because of these it is not lent; the greatest user of memory first, ``UNSEEN`` for one without a pid.
    taking: tuple[int, ...] = ()
    #: These only draw the desktop.
    desktop: tuple[int, ...] = ()


def find_strangers(use: DeviceUse, own: Collection[int]) -> Strangers:
    """Sort the processes on a device that are not in ``own``, the pids of its holder."""
    others = sorted((process for process in use.processes if process.pid not in own), key=_size, reverse=True)
    drawing = [process for process in others if process.graphics_only]
    desktop_bytes = sum(map(_size, drawing))
    if desktop_bytes > DESKTOP_BYTES:
        drawing, desktop_bytes = [], 0
    taking = tuple(process.pid for process in others if process not in drawing)
    if not taking and not own and (use.memory_used_bytes or 0) - desktop_bytes > _UNEXPLAINED_BYTES:
        taking = (UNSEEN,)
    return Strangers(taking, tuple(process.pid for process in drawing))


def find_all(uses: Iterable[DeviceUse], of_holder: Callable[[DeviceUuid], Collection[int]], locked: Callable[[tuple[DeviceUuid, ...]], Collection[DeviceUuid]]) -> dict[DeviceUuid, Strangers]:
    """The same of each device; what another daemon has ``locked`` is taken, whether or not anybody is seen on it. Blocking."""
    uses = tuple(uses)
    others = locked(tuple(use.uuid for use in uses))
    found = {use.uuid: find_strangers(use, of_holder(use.uuid)) for use in uses}
    return {uuid: Strangers((UNSEEN,), each.desktop) if uuid in others and not each.taking else each for uuid, each in found.items()}


def _size(process: DeviceProcess) -> float:
    """What is hidden may be any amount."""
    return float("inf") if process.used_bytes is None else process.used_bytes
