"""Everything that the client raises, as one tree.

    RemotedError
    ├── DaemonUnreachable (ConnectionError)   no daemon answers, and none could be started
    ├── VersionMismatch                       client and daemon, or caller and worker, do not fit
    ├── SubmissionRefused                     the daemon did not take the call (``code`` says why)
    │   ├── NoMatchingGPU                     this host can never serve the request
    │   └── QuotaExceeded                     one of your limits, named
    ├── SerializationError (TypeError)        something cannot be pickled; ``path`` names it
    ├── PoolBusy (TimeoutError)               a load-balanced call found no free worker in time
    └── RemoteExecutionError                  the remote side failed and has no better exception
        ├── JobFailed                         ``JobOutput.unwrap()`` of a job without an exception
        │   ├── WorkerLost                    the worker ended (``reason``: OOM_RAM, WORKER_DIED, LOST)
        │   ├── DependencyError               the environment could not be built; holds the log
        │   └── WouldDeadlock                 the call waits for what its own callers hold
        ├── JobCancelled
        └── JobTimedOut (TimeoutError)

``RemoteTraceback`` is only ever the ``__cause__`` of another exception: it shows where it was raised.
"""

from __future__ import annotations

from typing import Any

#: What to do about ``NoMatchingGPU`` in a script; a command is told something else.
WITHOUT_GPU = "; without such a GPU use one of the Cpu classes, or run it here: local=True, f.local(...) or REMOTED_LOCAL=1"


class RemotedError(Exception):
    """Base of every exception of remoted."""


class DaemonUnreachable(RemotedError, ConnectionError):
    """No daemon answers. The message says how to start one."""


class VersionMismatch(RemotedError):
    """Two sides that cannot understand each other; the message names both versions."""


class SubmissionRefused(RemotedError):
    """The daemon did not take the call; nothing was run. ``code`` is stable."""

    def __init__(self, message: str, code: str = "REFUSED") -> None:
        super().__init__(message)
        self.code = code


class NoMatchingGPU(SubmissionRefused):
    """This host can never serve the request; the message lists what it has."""


class QuotaExceeded(SubmissionRefused):
    """One of the caller's limits; the message names it."""


class SerializationError(RemotedError, TypeError):
    """A value that cannot be sent. ``path`` names it, e.g. ``argument 'config'.lock``."""

    def __init__(self, message: str, path: str = "") -> None:
        super().__init__(message)
        self.path = path


class PoolBusy(RemotedError, TimeoutError):
    """Every worker of the pool was busy for as long as the call may wait."""


class RemoteExecutionError(RemotedError):
    """The remote side failed, and its own exception could not come home.

    Attributes:
        exception_type: full name of the original class, e.g. ``"app.DatabaseError"``; ``""`` if there is none.
        why: why the original could not be sent; ``""`` if there is no original.
    """

    def __init__(self, message: str, *, exception_type: str = "", why: str = "") -> None:
        text = f"{exception_type}: {message}" if exception_type else message
        super().__init__(f"{text} (shown in this form because {why})" if why else text)
        self.exception_type = exception_type
        self.exception_message = message
        self.why = why

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.args, self.__dict__)


class JobFailed(RemoteExecutionError):
    """A job ended without an exception of its own; ``reason`` is its ``state_reason``."""

    def __init__(self, message: str, *, reason: str = "") -> None:
        super().__init__(message)
        self.reason = reason


class WorkerLost(JobFailed):
    """The worker ended while it ran the call."""


class DependencyError(JobFailed):
    """The environment could not be built; the message ends with the installer's log."""


class WouldDeadlock(JobFailed):
    """The call could only be served by what its own callers hold."""


class JobCancelled(RemoteExecutionError):
    """The job was cancelled."""


class JobTimedOut(RemoteExecutionError, TimeoutError):
    """The attempt ran longer than its ``timeout``."""


class RemoteTraceback(Exception):
    """The traceback of the remote side, as text; shown as the cause of the exception that came home."""

    def __init__(self, text: str) -> None:
        super().__init__(text)
        self.text = text

    def __str__(self) -> str:
        return f'\n"""\n{self.text}"""'


def _rebuild(kind: type[RemoteExecutionError], args: tuple[Any, ...], attributes: dict[str, Any]) -> RemoteExecutionError:
    error = kind.__new__(kind)
    error.args = args
    error.__dict__.update(attributes)
    return error


def for_fault(error: Exception) -> RemotedError:
    """What a call fails with when handling it went wrong here: a fault of this library, or something that this process lacks, such as descriptors."""
    if isinstance(error, RemotedError):
        return error
    fault = RemotedError(f"cannot go on with this call: {error if isinstance(error, OSError) else repr(error)}; other calls go on")
    fault.__cause__ = error
    return fault


def for_code(code: str, message: str) -> RemotedError:
    """The exception for a refusal by the daemon."""
    kinds: dict[str, type[SubmissionRefused]] = {"NO_MATCHING_GPU": NoMatchingGPU, "OVER_LIMIT": QuotaExceeded}
    if code in ("VERSION_MISMATCH", "BAD_VERSION"):
        return VersionMismatch(message)
    if code == "POOL_BUSY":
        return PoolBusy(f"{message}; raise workersMax of its config if the host has room for more workers, or call again later")
    if code == "NO_MATCHING_GPU":
        message += WITHOUT_GPU
    return kinds.get(code, SubmissionRefused)(message, code)


def for_outcome(status: str, reason: str, message: str) -> RemoteExecutionError:
    """The exception for a job that ended badly without one of its own."""
    if status == "CANCELLED":
        return JobCancelled(message)
    if status == "TIMED_OUT":
        return JobTimedOut(message)
    if reason in ("WORKER_DIED", "LOST", "OOM_RAM"):
        return WorkerLost(message, reason=reason)
    if reason == "ENVIRONMENT":
        return DependencyError(message, reason=reason)
    if reason == "WOULD_DEADLOCK":
        return WouldDeadlock(message, reason=reason)
    return JobFailed(message, reason=reason)
