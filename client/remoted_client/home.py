"""Where an instance of a remote class lives, as far as this process knows (MECHANISMS 14)."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from remoted_client.connection import Upload


class Home:
    """Of one instance. Its handle refers to it and so does each of its calls until that is over: behind the last of them it goes."""

    __slots__ = ("__weakref__", "constructor", "drops", "id", "was_constructed", "worker")

    def __init__(self, instance: str, constructor: Upload) -> None:
        self.id = instance
        self.constructor = constructor
        #: "" while nobody has asked the daemon.
        self.worker = ""
        #: How many instances that worker has been told to drop before.
        self.drops = 0
        self.was_constructed = False

    def settle(self, worker: str, drops: int) -> None:
        """The daemon's word."""
        self.worker, self.drops = worker, drops

    def note_construction(self) -> bool:
        """It was constructed in this moment. True: it had been before, and its state is lost."""
        before, self.was_constructed = self.was_constructed, True
        return before
