"""Outcomes and items that came with descriptors and were not read: who drops a handle never reads them.

Their descriptors are closed with the last one who could read them. Arrays go back to the worker, where their memory
would stay lent for as long as it lives.
"""

from __future__ import annotations

import contextlib
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from remoted_client.wire import Frame


class Unread:
    """The frames of one call."""

    def __init__(self) -> None:
        self._frames: dict[int, Frame] = {}

    def add(self, frame: Frame) -> None:
        self._frames[id(frame)] = frame

    def take(self, frame: Frame) -> None:
        """Somebody reads it, and closes what came with it."""
        self._frames.pop(id(frame), None)

    def __del__(self) -> None:
        with contextlib.suppress(Exception):  # at the end of the interpreter
            for frame in self._frames.values():
                drop(frame)


def drop(frame: Frame) -> None:
    """Nobody will read it."""
    if "segment" in frame.header:
        frame.header["releases"].add(frame.header["segment"])
    frame.close()
