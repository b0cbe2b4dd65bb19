"""What the end of an attempt means: F05, F24, F25, T55."""

from __future__ import annotations

import pytest

from remoted.attempts import AttemptEnd
from remoted.model import Reason, Status
from remoted.verdicts import describe, verdict


def end(kind: str, reason: Reason | None = None, stopped_by: Reason | None = None, error_type: str = "") -> AttemptEnd:
    return AttemptEnd(kind, message="m", reason=reason, stopped_by=stopped_by, error_type=error_type)


@pytest.mark.parametrize(
    ("found", "expected"),
    [
        (end("returned"), (Status.COMPLETED, None)),
        (end("raised", error_type="builtins.ValueError"), (Status.FAILED, Reason.EXCEPTION)),
        (end("raised", error_type="builtins.MemoryError"), (Status.FAILED, Reason.OOM_RAM)),
        (end("raised", error_type="torch.OutOfMemoryError"), (Status.FAILED, Reason.OOM_GPU)),
        (end("exited"), (Status.FAILED, Reason.EXITED)),
        (end("unsendable"), (Status.FAILED, Reason.RESULT_LOST)),
        (end("died", Reason.WORKER_DIED), (Status.FAILED, Reason.WORKER_DIED)),
        (end("died", Reason.LOST), (Status.FAILED, Reason.LOST)),
        (end("died", Reason.WORKER_DIED, Reason.TIMEOUT), (Status.TIMED_OUT, Reason.TIMEOUT)),
        (end("cancelled", stopped_by=Reason.CANCELLED), (Status.CANCELLED, Reason.CANCELLED)),
        (end("raised", stopped_by=Reason.CALLER_GONE), (Status.CANCELLED, Reason.CALLER_GONE)),
        (end("returned", stopped_by=Reason.CANCELLED), (Status.COMPLETED, None)),
        (end("stale"), (None, Reason.WAITING_WORKER)),
    ],
)
def test_f05_the_last_attempt_ends_the_job(found: AttemptEnd, expected: tuple[Status | None, Reason | None]) -> None:
    assert verdict(found, attempts=1, max_retries=0, delivered=0) == expected


@pytest.mark.parametrize("kind", ["raised", "exited", "died"])
def test_f24_another_attempt_follows_while_some_are_left_and_nothing_was_delivered(kind: str) -> None:
    assert verdict(end(kind), 1, 1, 0) == (None, Reason.WAITING_RETRY)
    assert verdict(end(kind), 2, 1, 0)[0] is Status.FAILED
    assert verdict(end(kind), 1, 5, 3)[0] is Status.FAILED


@pytest.mark.parametrize("found", [end("unsendable"), end("raised", error_type="remoted_client.errors.WouldDeadlock"), end("died", stopped_by=Reason.TIMEOUT)])
def test_f24_what_another_attempt_cannot_help_is_not_tried_again(found: AttemptEnd) -> None:
    assert verdict(found, 1, 9, 0)[0] is not None


def test_errors_read_as_sentences() -> None:
    assert describe(end("returned"), Status.COMPLETED, None, None, 0) == ("", "", "")
    assert describe(end("died"), Status.TIMED_OUT, Reason.TIMEOUT, 2.5, 0)[0] == "the attempt ran longer than its timeout of 2.5 s and was stopped"
    assert describe(end("raised", error_type="builtins.KeyError"), Status.FAILED, Reason.EXCEPTION, None, 2)[0] == "KeyError: m (2 items had been delivered)"


def test_c04_a_command_that_ended_says_so_itself_and_blames_no_line_of_python() -> None:
    ended = AttemptEnd("exited", message="the command exited with code 3", error_type="remoted_client.command.CommandEnded", traceback="Traceback", exit_code=3)
    assert describe(ended, Status.FAILED, Reason.EXITED, None, 0) == ("the command exited with code 3", ended.error_type, "")
