"""How a worker comes to be: which program, as whom, in which cgroup, within which limits.

The engine says what is wanted (``WorkerPlan``) and gets all that ``Worker.start`` needs (``Birth``).
"""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from remoted.access import Identity
from remoted.accounts import Accounts
from remoted.cgroup import Bounds, Groups
from remoted.environments import EnvironmentRequest
from remoted.errors import Forbidden, NoAccount, OverLimit, SpawnError
from remoted.family import Family
from remoted.gpu.enforce import DeviceRules
from remoted.limits import Limits
from remoted.spawn import reaper
from remoted.spawn.becoming import Becoming
from remoted.spawn.births import Start

log = logging.getLogger(__name__)
_NAMES_AGAIN_SECONDS = 5.0


@dataclass(frozen=True, slots=True)
class WorkerPlan:
    """How to start a worker of one kind."""

    executable: str
    environ: Mapping[str, str]
    memory_bytes: int | None = None
    environment: EnvironmentRequest | None = None
    #: The caller's soft limit of descriptors; the daemon's own is higher.
    descriptors: int = 1024
    #: The caller's version: code does not travel between minor versions of Python.
    version: tuple[int, ...] = ()
    #: What of the caller's variables an installer may see: indexes, proxies, certificates.
    build_environ: Mapping[str, str] = field(default_factory=dict)
    #: As whom, where the daemon can become somebody else.
    identity: Identity | None = None
    #: What a fork server imports for it: as its config says, and as the code of its functions lets expect.
    preload: tuple[str, ...] = ()
    hints: frozenset[str] = frozenset()
    #: Variables of the caller that such an import may read.
    import_environ: Mapping[str, str] = field(default_factory=dict)
    cpus: float | None = None


@dataclass(frozen=True, slots=True)
class Birth:
    """How a worker comes to be: the program, its variables, what it limits itself to, and as whom."""

    start: Start
    limits: dict[str, object]
    family: Family

    def first_words(self) -> dict[str, object]:
        """What it shall keep to, and whom it shall find itself to be before it does anything else."""
        becoming = self.start.becoming
        if becoming is None:
            return {**self.limits}
        identity = becoming.identity
        return {**self.limits, "uid": identity.uid, "gid": identity.gid, "groups": list(identity.groups), "no_new_privileges": becoming.no_new_privileges}


class Cradle:
    """What all workers of a daemon have in common. A user's own daemon knows neither other users nor groups."""

    def __init__(self, limits: Limits, sockets: Path) -> None:
        self._limits = limits
        self._sockets = sockets
        #: How a process becomes another user. Set by the composition root.
        self.become: Callable[[Identity], Becoming] = Becoming
        #: Does the daemon serve others than its own user? Then each worker must be somebody's.
        self.is_shared = False
        #: Asked before a process becomes somebody.
        self.accounts = Accounts()
        #: Where workers get groups of their own.
        self.cgroups: Groups | None = None
        #: What the kernel keeps of which cards a worker may open; None where it is left to manners.
        self.rules: DeviceRules | None = None

    async def require_account(self, identity: Identity | None) -> None:
        """Is there such a user still, and is it the one who called? Raises NoAccount. A name service that does not answer is waited for: that is nobody's failure."""
        if identity is None:
            return
        uid = identity.uid
        while True:
            try:
                name = await self.accounts.require(uid, anew=True)
            except Forbidden:
                raise NoAccount(f"cannot run as uid {uid}: it has no account on this host any more") from None
            except OverLimit as error:
                log.warning("no worker of uid %d starts before the name service answers: %s", uid, error)
                await asyncio.sleep(_NAMES_AGAIN_SECONDS)
            else:
                break
        if name and identity.name and name != identity.name:
            raise NoAccount(f"cannot run as uid {uid}: that was {identity.name} when the call was made, and is {name} now")

    def prepare(self, worker_id: str, plan: WorkerPlan, start: Start, cards: tuple[int, ...] | None = ()) -> Birth:
        """Everything is made that the worker finds. ``cards``: minor numbers of those that are lent to it, None if they are not known. Raises OSError when its group cannot be made, SpawnError without an identity."""
        if self.is_shared and plan.identity is None:
            raise SpawnError("cannot start a worker: nobody has said as whom")  # root is nobody's default
        family = self._make_family(worker_id, plan, cards)
        becoming = self.become(plan.identity).inside(family.group) if plan.identity is not None else None
        return Birth(replace(start, becoming=becoming, group=family.group), self._limits_of(plan, family), family)

    def variables(self, worker_id: str, devices: tuple[str, ...], has_devices: bool) -> dict[str, str]:
        """What it finds in its environment beside its caller's. ``has_devices``: has the host any?"""
        variables = {reaper.WORKER_VARIABLE: worker_id, "REMOTED_SOCKET": os.fspath(self._sockets)}
        if devices or has_devices:
            # A CPU worker on a GPU host sees none: the pool would be a fiction otherwise.
            variables["CUDA_VISIBLE_DEVICES"] = ",".join(devices)
        return variables

    def _make_family(self, worker_id: str, plan: WorkerPlan, cards: tuple[int, ...] | None) -> Family:
        if self.cgroups is None or plan.identity is None:
            return Family(worker_id, uid=plan.identity.uid if plan.identity else None)
        bounds = Bounds(self._limits.worker_memory(plan.memory_bytes), plan.cpus, self._limits.worker_tasks)
        group = self.cgroups.make(worker_id, bounds)
        if self.rules is not None:
            group.device_program = self.rules.program(cards) if cards is not None else -1
        return Family(worker_id, group, bounds)

    def _limits_of(self, plan: WorkerPlan, family: Family) -> dict[str, object]:
        """What the worker limits itself to: memory only where no group does."""
        is_bounded = family.has_group and self.cgroups is not None and "memory" in self.cgroups.controllers
        return {
            "data_bytes": None if is_bounded else plan.memory_bytes,
            "descriptors": plan.descriptors,
            "tasks": self._limits.worker_tasks,
            "refusals_file": family.refusals_file,
        }
