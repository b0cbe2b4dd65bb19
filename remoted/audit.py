"""One line for each call that is over: an entry of the journal with fields where systemd runs us, else a line of the log.

What a user named is cut and escaped (T19): it is read in terminals, and must not look like another entry. Arguments, results,
output and errors are never written.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping

from remoted.endings import Ending
from remoted.journal import Journal
from remoted.model import Reason, Status

log = logging.getLogger(__name__)
#: What `journalctl MESSAGE_ID=` finds: the end of a call, and nothing else.
MESSAGE_ID = "5f0b6ad9a1c24c7c8f8e6f3d2b7c9e14"
_NAME_CHARACTERS = 120
_GPUS_MOST = 16
#: syslog(3): informational, notice, warning.
_INFO, _NOTICE, _WARNING = "6", "5", "4"
#: No fault of the call's own.
_THE_HOSTS = frozenset({Reason.LOST.value, Reason.RESULT_LOST.value, Reason.WORKER_START_FAILED.value, Reason.OOM_RAM.value})


class Audit:
    """``names``: may it say what users call their jobs and pools?"""

    def __init__(self, journal: Journal | None, names: bool) -> None:
        self.names = names
        self._write: Callable[[Ending, Mapping[str, str]], None] = _log if journal is None else lambda ending, fields: _send(journal, ending, fields)

    def note(self, ending: Ending) -> None:
        self._write(ending, fields_of(ending, self.names))


def fields_of(ending: Ending, names: bool) -> dict[str, str]:
    """What is written of it, in this order; each value one short line."""
    words = {"NAME": plain(ending.name), "POOL": plain(ending.pool)} if names else {}
    return {
        "JOB_ID": ending.id,
        "KIND": ending.kind,
        "UID": str(ending.uid),
        **words,
        "STATUS": ending.status.value,
        "REASON": ending.reason,
        "ATTEMPTS": str(ending.attempts),
        "QUEUE_SECONDS": f"{ending.queue_seconds:.3f}",
        "RUN_SECONDS": f"{ending.run_seconds:.3f}",
        "GPUS": " ".join(ending.gpus[:_GPUS_MOST]),
        "WORKER": ending.worker,
        "RESULT_BYTES": str(ending.result_bytes),
    }


def plain(text: str) -> str:
    """One line of readable characters, not too long; a quote or a backslash of the user's cannot pass for ours."""
    cut = text if len(text) <= _NAME_CHARACTERS else text[: _NAME_CHARACTERS - 1] + "…"
    return "".join(_plain(character) for character in cut)


def _plain(character: str) -> str:
    if character in '"\\' or not character.isprintable():
        return character.encode("unicode_escape", "surrogatepass").decode("ascii") if character != '"' else '\\"'
    return character


def _send(journal: Journal, ending: Ending, fields: Mapping[str, str]) -> None:
    own = {"MESSAGE": _message(ending), "MESSAGE_ID": MESSAGE_ID, "PRIORITY": _priority(ending), "SYSLOG_IDENTIFIER": "remoted"}
    journal.send({**own, **{f"REMOTED_{key}": value for key, value in fields.items()}})


def _message(ending: Ending) -> str:
    why = f" ({ending.reason})" if ending.reason else ""
    return f"job {ending.id} of uid {ending.uid} {ending.status.value}{why}: waited {ending.queue_seconds:.1f} s, ran {ending.run_seconds:.1f} s"


def _priority(ending: Ending) -> str:
    if ending.reason in _THE_HOSTS:
        return _WARNING
    return _NOTICE if ending.status in (Status.FAILED, Status.TIMED_OUT) else _INFO


def _log(ending: Ending, fields: Mapping[str, str]) -> None:
    text = " ".join(f'{key.lower()}="{value}"' if key in ("NAME", "POOL", "GPUS") else f"{key.lower()}={value}" for key, value in fields.items())
    log.log(logging.WARNING if _priority(ending) == _WARNING else logging.INFO, "ended %s", text)
