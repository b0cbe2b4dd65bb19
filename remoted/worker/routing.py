"""With several calls in one worker: which of them printed this.

Descriptor 1 is one for all of them, so Python-level writes are sent over the channel with the call that the context
variable names. What is written past Python (C libraries, child processes) still goes through the pipes and counts
as the output of the call that began last.
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

from remoted_client import context as client_context

#: Of one frame's body; see ``wire.INLINE_BYTES``.
_CHUNK_BYTES = 48 * 1024


class RoutedStream(io.TextIOBase):
    """Stands for ``sys.stdout`` or ``sys.stderr``; everything but ``write`` is the original's."""

    def __init__(self, original: Any, number: int, send: Callable[[str, int, bytes], object]) -> None:
        self._original = original
        self._number = number
        self._send = send

    def write(self, text: str) -> int:
        call = client_context.current.get()
        if call is None:
            self._original.write(text)
            return len(text)
        data = text.encode("utf-8", "backslashreplace")
        for start in range(0, len(data), _CHUNK_BYTES):
            self._send(call.attempt, self._number, data[start : start + _CHUNK_BYTES])
        return len(text)

    def flush(self) -> None:
        self._original.flush()

    def fileno(self) -> int:
        return int(self._original.fileno())

    def writable(self) -> bool:
        return True

    def isatty(self) -> bool:
        return False

    @property
    def closed(self) -> bool:
        return bool(self._original.closed)

    @property
    def buffer(self) -> Any:
        return self._original.buffer

    @property
    def encoding(self) -> str:  # type: ignore[override]
        return "utf-8"
