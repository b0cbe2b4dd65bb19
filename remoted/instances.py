"""Objects of remote classes that live in workers: where each does is the scheduler's word, how many one user may have is said here."""

from __future__ import annotations

from remoted.engine import Engine
from remoted.errors import OverLimit
from remoted.limits import Limits
from remoted.model import Uid
from remoted.needs import instance_key
from remoted.scheduler.events import InstanceFound
from remoted.workers import Worker


class Instances:
    """Of every user. Ids are made by clients, so nobody's names another's."""

    def __init__(self, engine: Engine, limits: Limits) -> None:
        self._engine = engine
        self._limits = limits
        #: Those that were constructed once, oldest first: constructed again, they have lost their state.
        self._constructed: dict[int, dict[str, None]] = {}

    def admit(self, uid: int, instance: str) -> None:
        """It may be called. Raises OverLimit: it is new, and its user has too many that live."""
        scheduler, most = self._engine.scheduler, self._limits.instances_per_uid
        if instance_key(uid, instance) not in scheduler.homes and scheduler.instances_of(Uid(uid)) >= most:
            raise OverLimit("OVER_LIMIT", f"cannot construct another object: {most} of yours live in workers, and your limit instances_per_uid is {most}; drop or close() some")

    def settle(self, worker: Worker, uid: int, instance: str) -> Worker | None:
        """Where it lives: in this worker from now on, if nowhere yet. None: neither there, as it ends. Raises OverLimit."""
        self.admit(uid, instance)
        self._engine.handle(InstanceFound(instance_key(uid, instance), worker.id))
        return self.home(uid, instance)

    def home(self, uid: int, instance: str) -> Worker | None:
        home = self._engine.scheduler.homes.get(instance_key(uid, instance))
        return self._engine.workers.get(home) if home is not None else None

    def remember(self, worker: Worker, uid: int, instance: str) -> None:
        """It lives in a worker of an earlier daemon's."""
        self._engine.handle(InstanceFound(instance_key(uid, instance), worker.id))
        self.note_construction(uid, instance)

    def note_construction(self, uid: int, instance: str) -> bool:
        """It was constructed in this moment, or what was there is gone. True: it had been constructed before."""
        constructed = self._constructed.setdefault(uid, {})
        before = instance in constructed
        constructed[instance] = None
        if len(constructed) > self._limits.instances_per_uid:
            del constructed[next(iter(constructed))]
        return before

    def drop(self, uid: int, instance: str) -> None:
        """Its handle is gone: the worker that holds it forgets it."""
        constructed = self._constructed.get(uid, {})
        constructed.pop(instance, None)
        if not constructed:
            self._constructed.pop(uid, None)
        home = self.home(uid, instance)
        if home is not None:
            home.drop_instance(instance)
            self._engine.drop_instance(instance_key(uid, instance))
