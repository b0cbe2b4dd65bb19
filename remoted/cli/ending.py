"""How every command ends: one sentence on standard error, one exit code."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable

from remoted.cli.text import escape

INTERRUPTED = 130


class CliError(Exception):
    """A command cannot go on. The message is for people."""

    exit_code = 1


class UsageError(CliError):
    exit_code = 2


class NoDaemon(CliError):
    """Nobody answers, or not somebody to be trusted."""

    exit_code = 3


class Refusal(CliError):
    """The daemon said no; ``code`` is stable."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.code = code
        self.exit_code = 4 if status == 404 else 1


def ending(action: Callable[[], int]) -> int:
    """Run a command and give its exit code, whatever happens in it."""
    try:
        code = action()
        sys.stdout.flush()
        return code
    except CliError as error:
        print(f"remotectl: {escape(str(error))}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        return INTERRUPTED
    except BrokenPipeError:
        # `remotectl ps | head`: not an error, and the interpreter must not flush into the broken pipe again.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
