"""What calls print: shown at once where the caller is, kept for ``JobOutput``, and kept off a line of progress."""

from __future__ import annotations

import codecs
import contextlib
import os
import sys
import threading
from typing import Any

from remoted_client import context, wire

#: What is kept of a call's output for ``JobOutput.stdout``: its last part. The daemon keeps more.
_KEPT_CHARACTERS = 16 << 20


class Bookmark:
    """How far a log of the daemon's was read. Long records come in pieces, and who comes back is told from a record's beginning."""

    def __init__(self) -> None:
        self._offset = 0
        #: Of the record that comes: bytes that were taken, and bytes that came since the reader is back.
        self._taken = 0
        self._come = 0

    def take(self, frame: wire.Frame) -> bytes:
        """What is new of it."""
        new = frame.body[max(0, self._taken - self._come) :]
        self._come += len(frame.body)
        self._taken = max(self._taken, self._come)
        if (behind := frame.header.get("offset")) is not None:
            self._offset, self._taken, self._come = behind, 0, 0
        return new

    def come_back(self) -> int:
        """From where the next daemon shall tell it."""
        self._come = 0
        return self._offset


class Printed:
    """What a call has printed: shown at once where the caller is, and its last part kept."""

    def __init__(self, echo: bool) -> None:
        self._echo = echo
        self._texts: dict[int, list[str]] = {1: [], 2: []}
        self._kept = {1: 0, 2: 0}
        self._dropped = {1: 0, 2: 0}
        self._decoders = {stream: codecs.getincrementaldecoder("utf-8")("replace") for stream in (1, 2)}

    def add(self, stream: int, data: bytes) -> None:
        text = self._decoders[stream].decode(data)
        kept = self._texts[stream]
        kept.append(text)
        self._kept[stream] += len(text)
        while self._kept[stream] > _KEPT_CHARACTERS and len(kept) > 1:
            first = len(kept.pop(0))
            self._kept[stream] -= first
            self._dropped[stream] += first
        if self._echo and text:
            echo.show(stream, text)

    def text(self, stream: int, call_id: str) -> str:
        missing = self._dropped[stream]
        head = f"[remoted: the first {missing:,} characters are not here; `remotectl logs {call_id}` has them]\n" if missing else ""
        return head + "".join(self._texts[stream])


class _Echo:
    """Shows what calls print. The interpreter aborts when a thread of ours is in a stream as it ends, so that is waited for."""

    _LAST_WORD_SECONDS = 1.0

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._is_over = False
        #: What stands at the bottom of the terminal and is written again below all that is shown.
        self._line = ""
        self._is_mid_line = False

    def show(self, stream: int, text: str) -> None:
        target = sys.stdout if stream == 1 else sys.stderr
        with self._lock, contextlib.suppress(Exception):  # a closed or replaced stream of the caller's is not our failure
            if self._is_over:
                return
            shares = target.isatty()
            if shares and self._line and not self._is_mid_line:
                self._write("\r\x1b[K")
            target.write(text)
            target.flush()
            self._is_mid_line = shares and not text.endswith("\n")
            if shares and self._line and not self._is_mid_line:
                self._write(self._line)

    def draw(self, line: str, *, is_last: bool = False) -> None:
        """The line at the bottom of the terminal, in place of the one before; the last one stays where it is."""
        with self._lock:
            begin = "\n" if self._is_mid_line else "\r"
            self._is_mid_line = False
            self._line = "" if is_last else line
            self._write(f"{begin}{line}\x1b[K" + "\n" * is_last)

    def _write(self, text: str) -> None:
        sys.stderr.write(text)
        sys.stderr.flush()

    def end(self) -> None:
        """The script ends: nothing more is shown. A stream that takes nothing is not waited for."""
        acquired = self._lock.acquire(timeout=self._LAST_WORD_SECONDS)
        self._is_over = True
        if acquired:
            self._lock.release()

    def forget(self) -> None:
        """In a forked child: the parent's thread may have been at it."""
        self._lock = threading.Lock()


echo = _Echo()
os.register_at_fork(after_in_child=echo.forget)



def tell_fault(what: str) -> None:
    """The exception that is being handled, where no call is concerned that could fail with it."""
    import traceback

    echo.show(2, f"remoted: {what}; everything else goes on\n{traceback.format_exc()}")


_unloaded: set[str] = set()


def tell_preload(name: str, state: dict[str, Any]) -> None:
    """``preload=`` had no effect in the worker that took a call: each reason is said once."""
    reason = state.get("no_preload", "")
    if reason and reason not in _unloaded and not context.in_worker:
        _unloaded.add(reason)
        echo.show(2, f"remoted: preload= has no effect for {name}: {reason}; its workers start without it\n")
