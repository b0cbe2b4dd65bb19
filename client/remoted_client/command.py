"""How a command ended that ran as a job (``remotectl run``): in the words of commands, not of Python."""

from __future__ import annotations

import os
import signal

NOT_FOUND, NOT_EXECUTABLE = 127, 126  # as shells give them
_BY_SIGNAL = 128


class CommandEnded(SystemExit):
    """The command did not end well. ``code`` is what a shell gives for it, 128 + N for signal N."""

    def __init__(self, code: int, message: str) -> None:
        super().__init__(code)
        self.message = message

    def __str__(self) -> str:
        return self.message

    def __reduce__(self) -> tuple[type[CommandEnded], tuple[object, str]]:
        return CommandEnded, (self.code, self.message)


def ended(returncode: int) -> CommandEnded:
    """By the code of ``subprocess``: negative for a signal."""
    if returncode >= 0:
        return CommandEnded(returncode, f"the command exited with code {returncode}")
    return CommandEnded(_BY_SIGNAL - returncode, f"the command was killed by {_name(-returncode)}")


def cannot_run(program: str, error: OSError) -> CommandEnded:
    """It never began."""
    if isinstance(error, FileNotFoundError):
        there = os.path.exists(program)  # then what its first line names is not
        return CommandEnded(NOT_FOUND, f"cannot run {program}: {'the interpreter that it names is not found' if there else 'not found'}")
    return CommandEnded(NOT_EXECUTABLE, f"cannot run {program}: {(error.strerror or 'it failed').lower()}")


def _name(number: int) -> str:
    try:
        return f"signal {number} ({signal.Signals(number).name})"
    except ValueError:
        return f"signal {number}"
