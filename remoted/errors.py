"""What can go wrong, as one tree; each leaf has a stable code that travels to the caller.

    RemotedError
    ├── Refused             the caller asked for something that is not done (code, HTTP status, hint)
    │   ├── BadRequest      400  malformed or impossible
    │   ├── Forbidden       403  not for this caller
    │   ├── NotFound        404  unknown, or somebody else's (the answer is the same, T10)
    │   ├── Conflict        409  not in this state
    │   └── OverLimit       429  a limit, named
    ├── StoreError          the database refuses or fails (disk full, corrupt, newer version)
    │   └── StoreBroken     it may say what is not on the disk: nothing more is stored by this daemon
    ├── SocketsLost         they were taken away: nobody can come in
    ├── SpawnError          a process could not be started
    │   └── NoAccount       its user is none of the host's any more
    └── StartupError        the daemon cannot start: somebody else runs, a path is unsafe
"""

from __future__ import annotations


class RemotedError(Exception):
    """Base of everything that the daemon raises on purpose."""


class Refused(RemotedError):
    """A request that is not carried out. ``code`` is stable; the message says what to do."""

    http_status = 400

    def __init__(self, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code


class BadRequest(Refused):
    http_status = 400


class Forbidden(Refused):
    http_status = 403


class NotFound(Refused):
    http_status = 404


class Conflict(Refused):
    http_status = 409


class OverLimit(Refused):
    http_status = 429


class StoreError(RemotedError):
    """The database did not take a change; nothing of that change was acknowledged."""


class StoreBroken(StoreError):
    """An fsync failed: what the kernel holds and what the disk holds may differ from here on (T51)."""


class SocketsLost(RemotedError):
    """Nobody can come in any more; the next daemon makes its sockets anew."""


class SpawnError(RemotedError):
    """A worker process could not be started."""


class NoAccount(SpawnError):
    """The host does not know whom it would run as, or knows somebody else by this uid."""


class StartupError(RemotedError):
    """The daemon cannot start; the message is for the person who started it."""
