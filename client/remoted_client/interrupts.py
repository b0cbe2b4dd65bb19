"""Ctrl-C while a script waits for its calls: one sentence, and not a traceback through this library.

The exception stays what it is, so the script ends as an interrupted program does (by SIGINT; 130 in a shell). Only what is shown
differs, and only where it is certain: nobody else has said how exceptions are shown, and no code of the user's was interrupted.
"""

from __future__ import annotations

import os
import sys
import threading
from collections.abc import Iterator
from types import CodeType, TracebackType

from remoted_client import context

_OURS = os.path.dirname(os.path.abspath(__file__)) + os.sep
_PYTHONS = os.path.dirname(os.path.abspath(threading.__file__)) + os.sep


class Interrupts:
    """Of this process."""

    #: What ends with the script needs no more words then.
    is_told = False

    def show_plainly(self) -> None:
        """From here on. At a prompt, and beside another hook, all stays as it is."""
        if sys.excepthook is sys.__excepthook__ and not context.in_worker and not hasattr(sys, "ps1"):
            sys.excepthook = self._show

    def _show(self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None) -> None:
        place = _place(error) if kind is KeyboardInterrupt else ""
        if not place or sys.stderr is None:
            sys.__excepthook__(kind, error, traceback)
            return
        self.is_told = True
        sys.stderr.write(f"remoted: interrupted at {place}, while it waited; the calls of this script are cancelled, but for detached ones\n")


def _place(error: BaseException | None) -> str:
    """Where the script waited for us; "" if it did something else. asyncio cancels whoever waits, and raises KeyboardInterrupt after that."""
    while error is not None:
        frames = [(code, line) for code, line in _frames(error.__traceback__) if not _is_pythons(code)]
        if frames and frames[-1][0].co_filename.startswith(_OURS):
            theirs = [(code, line) for code, line in frames if not code.co_filename.startswith(_OURS)]
            return f"{theirs[-1][0].co_filename}:{theirs[-1][1]}" if theirs else ""
        error = error.__context__
    return ""


def _frames(traceback: TracebackType | None) -> Iterator[tuple[CodeType, int]]:
    while traceback is not None:
        yield traceback.tb_frame.f_code, traceback.tb_lineno
        traceback = traceback.tb_next


def _is_pythons(code: CodeType) -> bool:
    """Of the standard library, in which everybody waits."""
    return code.co_filename.startswith((_PYTHONS, "<frozen")) and "site-packages" not in code.co_filename


interrupts = Interrupts()
