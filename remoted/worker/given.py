"""Calls that the daemon has given to this worker and that have not begun: they may be taken back until they do.

Which call was begun last stands in a page that outlives this process (``remoted/progress.py``): of those behind it
nothing has run. Beginning, taking back and the end of the daemon exclude each other.
"""

from __future__ import annotations

import mmap
import os
import threading

from remoted_client import wire

from .calls import Run


class Given:
    """The channel's thread adds and takes back; whoever runs a call asks ``begin`` first."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: set[str] = set()
        self._running: set[str] = set()
        self._page: mmap.mmap | None = None

    def open(self, page: int) -> None:
        """The descriptor is closed here."""
        self._page = mmap.mmap(page, wire.PROGRESS_PAGE_BYTES)
        os.close(page)

    def add(self, run: Run) -> None:
        self._waiting.add(run.attempt)

    def begin(self, run: Run) -> bool:
        """From here on it counts. False: it was taken back."""
        with self._lock:
            if run.attempt not in self._waiting:
                return False
            self._waiting.discard(run.attempt)
            self._running.add(run.attempt)
            if self._page is not None:
                wire.PROGRESS_PAGE.pack_into(self._page, 0, run.position, 0)
            return True

    def end(self, attempt: str) -> None:
        """Its outcome is kept, or there will be none."""
        with self._lock:
            self._running.discard(attempt)

    def look(self) -> tuple[list[str], list[str]]:
        """What has begun and is not over, and what has not begun."""
        with self._lock:
            return list(self._running), list(self._waiting)

    def recall(self, attempts: list[str]) -> list[str]:
        """Which of these have not begun, and never will."""
        with self._lock:
            taken = [attempt for attempt in attempts if attempt in self._waiting]
            self._waiting.difference_update(taken)
            return taken

    def close(self) -> None:
        """The daemon is gone: what has not begun is the next one's."""
        with self._lock:
            self._waiting.clear()
            if self._page is not None:
                begun, _ = wire.PROGRESS_PAGE.unpack_from(self._page)
                wire.PROGRESS_PAGE.pack_into(self._page, 0, begun, 1)
