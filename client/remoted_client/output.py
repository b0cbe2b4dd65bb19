"""``JobOutput``: what a queue call gives, in the Flash document's words, and more."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

from remoted_client.errors import for_outcome
from remoted_client.wire import Status

R = TypeVar("R")


@dataclass
class JobOutput(Generic[R]):
    """The end of a job. A failed job does not raise; it says so in ``error``.

    Example:
        >>> job = await train(data)
        >>> if job.error: print(job.status, job.error)
        >>> model = job.unwrap()          # or raise what the function raised

    Attributes:
        id: the job's id, for ``Job.from_id`` and ``remotectl``.
        status: ``COMPLETED``, ``FAILED``, ``CANCELLED`` or ``TIMED_OUT``.
        output: the function's return value; None unless completed.
        error: what went wrong, in one line; None on success.
        started_at, ended_at: Unix seconds; ``started_at`` is None if no attempt began.
        attempts: how many tries there were.
        worker_id: the worker of the last try.
        exception: the exception itself, with its attributes, cause and ``remote_traceback``; None on success.
        stdout, stderr: what the function printed.
        queue_seconds, run_seconds: time before the first attempt, and in attempts.
        gpu: UUIDs of the devices of the last try.
        state_reason: why it died (``OOM_RAM``, ``WORKER_DIED``, ...); "" on success.
        reconstructed: a remote class's instance had to be constructed again.
    """

    id: str
    status: Status
    output: R | None
    error: str | None
    started_at: int | None
    ended_at: int | None
    attempts: int = 1
    worker_id: str = ""
    exception: BaseException | None = field(default=None, repr=False)
    stdout: str = field(default="", repr=False)
    stderr: str = field(default="", repr=False)
    queue_seconds: float = 0.0
    run_seconds: float = 0.0
    gpu: tuple[str, ...] = ()
    state_reason: str = ""
    reconstructed: bool = False

    def unwrap(self) -> R:
        """The return value. Raises the function's own exception, or the one that says how the job ended.

        A body's SystemExit or KeyboardInterrupt ends the body, not the script that looks at it: it is the cause of a JobFailed.
        """
        if self.status is Status.COMPLETED:
            return self.output  # type: ignore[return-value]
        if isinstance(self.exception, Exception):
            raise self.exception
        raise for_outcome(self.status.value, self.state_reason, self.error or "the job failed") from self.exception


def in_one_line(error: BaseException) -> str:
    """As ``JobOutput.error`` says it."""
    message = str(error)
    return f"{type(error).__name__}: {message}" if message else type(error).__name__


def from_done(header: dict[str, Any], output: Any, exception: BaseException | None, stdout: str, stderr: str) -> JobOutput[Any]:
    """From the daemon's last word about a job."""
    started, submitted = header["started_at"], header["submitted_at"]
    return JobOutput(
        id=header["id"],
        status=Status(header["status"]),
        output=output,
        # Our own classes go by their public names; an exception may have no message.
        error=header["error"].removeprefix("remoted_client.errors.").removesuffix(": ") or None,
        started_at=int(started) if started else None,
        ended_at=int(header["ended_at"]) if header["ended_at"] else None,
        attempts=header["attempts"],
        worker_id=header["worker"],
        exception=exception,
        stdout=stdout,
        stderr=stderr,
        queue_seconds=max(0.0, (started or header["ended_at"] or submitted) - submitted),
        run_seconds=header["run_seconds"],
        gpu=tuple(header["gpus"]),
        state_reason=header["reason"],
        reconstructed=header["reconstructed"],
    )
