"""What the end of an attempt means for its job: the terminal status, or another attempt. Pure."""

from __future__ import annotations

from remoted.attempts import AttemptEnd
from remoted.model import Reason, Status

_OUT_OF_MEMORY = {
    "builtins.MemoryError": Reason.OOM_RAM,
    "numpy._core._exceptions._ArrayMemoryError": Reason.OOM_RAM,
    "torch.OutOfMemoryError": Reason.OOM_GPU,
    "torch.cuda.OutOfMemoryError": Reason.OOM_GPU,
    "cupy.cuda.memory.OutOfMemoryError": Reason.OOM_GPU,
}
#: What `remotectl run` makes of a command's end: it says for itself how it ended, and no line of Python is to blame.
_COMMAND_ENDED = "remoted_client.command.CommandEnded"
_STOPPED: dict[Reason | None, str] = {
    Reason.CALLER_GONE: "stopped: its caller is gone",
    Reason.PARENT_ENDED: "stopped: the call whose body made it was cancelled, or is over",
    Reason.ADMINISTRATOR: "stopped: an administrator of this host has cancelled it",
    Reason.DAEMON_STOPPED: "stopped: the daemon was told to end at once, running jobs included",
}
#: A nested call that was refused is refused again: trying would only multiply along the chain of callers.
_PERMANENT = frozenset(f"remoted_client.errors.{name}" for name in ("SubmissionRefused", "NoMatchingGPU", "WouldDeadlock", "SerializationError", "VersionMismatch"))


def verdict(end: AttemptEnd, attempts: int, max_retries: int, delivered: int) -> tuple[Status | None, Reason | None]:
    """(terminal status, why), or (None, why) when another attempt follows; ``delivered`` items of a stream forbid that."""
    if end.kind == "returned":
        return Status.COMPLETED, None
    if end.kind == "stale":
        return None, Reason.WAITING_WORKER  # refused before any code of the user's ran
    if end.stopped_by is Reason.TIMEOUT:
        return Status.TIMED_OUT, Reason.TIMEOUT
    if end.stopped_by is not None:
        return Status.CANCELLED, end.stopped_by
    reason = cause(end)
    may_help = reason is not Reason.RESULT_LOST and end.error_type not in _PERMANENT
    if attempts <= max_retries and not delivered and may_help:
        return None, Reason.WAITING_RETRY
    return Status.FAILED, reason


def cause(end: AttemptEnd) -> Reason:
    """Why an attempt that nobody stopped went wrong."""
    if end.reason is not None:
        return end.reason
    if end.kind == "exited":
        return Reason.EXITED
    if end.kind == "unsendable":
        return Reason.RESULT_LOST
    return _OUT_OF_MEMORY.get(end.error_type, Reason.EXCEPTION)


def describe(end: AttemptEnd, status: Status | None, reason: Reason | None, timeout_seconds: float | None, delivered: int) -> tuple[str, str, str]:
    """(error, type, traceback) as the caller reads them; empty on success."""
    if status is Status.COMPLETED or end.kind == "stale":
        return "", "", ""
    if status is Status.TIMED_OUT:
        return f"the attempt ran longer than its timeout of {timeout_seconds or 0:g} s and was stopped", "", end.traceback
    if status is Status.CANCELLED:
        return stopped(reason), "", end.traceback
    if end.error_type == _COMMAND_ENDED:
        return end.message, end.error_type, ""
    if end.kind == "exited":
        return end.message, end.error_type, end.traceback
    message = f"{_short(end.error_type)}: {end.message}" if end.error_type else end.message
    if delivered:
        message += f" ({delivered} items had been delivered)"
    return message, end.error_type, end.traceback


def stopped(reason: Reason | None) -> str:
    """What a caller reads of a job that was stopped."""
    return _STOPPED.get(reason, "stopped: it was cancelled")


def _short(type_name: str) -> str:
    """``builtins.ValueError`` is ValueError; others keep their module."""
    return type_name.removeprefix("builtins.").removeprefix("__main__.")
