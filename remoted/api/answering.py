"""What becomes of one call whose answer goes out over HTTP: its parts in order, at the pace at which they are taken.

An answer is a line of JSON (status and content type) and the body behind it, as the worker wrote them; of a stream the
first item begins with that line. What a worker says is checked here and nowhere believed (T34).
"""

from __future__ import annotations

import asyncio
import json
import os
from collections import deque
from collections.abc import AsyncIterator
from dataclasses import dataclass
from typing import Any

from remoted.attempts import Content
from remoted.calls import Call
from remoted.endpoints import Owner

_HEAD_BYTES = 1024
_CHUNK_BYTES = 256 * 1024
NDJSON, EVENTS = "application/x-ndjson", "text/event-stream"
#: What a worker may call its answer. Nothing that a browser runs is among them.
_TYPES = frozenset({"application/json", "application/octet-stream", NDJSON, EVENTS, "text/plain; charset=utf-8"})


class BadAnswer(Exception):
    """A worker's answer has no head that can be read."""


@dataclass(frozen=True, slots=True)
class Head:
    status: int
    content_type: str
    #: How many bytes of its part it took.
    size: int


class Part:
    """Bytes in memory, or in a file of which this is the only descriptor."""

    def __init__(self, content: Content) -> None:
        self._inline = content.inline
        self._fd = -1 if content.inline is not None else content.open()
        self.size = len(content.inline) if content.inline is not None else os.fstat(self._fd).st_size

    def head(self) -> Head:
        """Raises BadAnswer."""
        data = self._inline[:_HEAD_BYTES] if self._inline is not None else os.pread(self._fd, _HEAD_BYTES, 0)
        line, end, _ = data.partition(b"\n")
        try:
            document = json.loads(line)
            status, content_type = document["status"], document["type"]
        except (ValueError, KeyError, TypeError, RecursionError):
            raise BadAnswer from None
        if not end or type(status) is not int or not (status == 200 or 400 <= status <= 599) or type(content_type) is not str or content_type not in _TYPES:
            raise BadAnswer
        return Head(status, content_type, len(line) + 1)

    async def chunks(self, start: int = 0) -> AsyncIterator[bytes]:
        if self._inline is not None:
            if len(self._inline) > start:
                yield self._inline[start:]
            return
        while chunk := await asyncio.to_thread(os.pread, self._fd, _CHUNK_BYTES, start):
            start += len(chunk)
            yield chunk

    def close(self) -> None:
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1


class Answering:
    """The ``Watcher`` of one call. Its parts are its own, whatever becomes of the call."""

    def __init__(self, call: Call, owner: Owner) -> None:
        self._call = call
        self._owner = owner
        self._parts: deque[Part] = deque()
        self._news = asyncio.Event()
        self.is_over = call.status.is_terminal
        call.watchers.add(self)

    async def next(self) -> Part | None:
        """The next part; None once there is none any more."""
        while not self._parts and not self.is_over:
            self._news.clear()
            await self._news.wait()
        return self._parts.popleft() if self._parts else None

    def close(self) -> None:
        self._call.watchers.discard(self)
        while self._parts:
            self._parts.popleft().close()

    # -- a watcher -----------------------------------------------------------------------------------------

    def owns(self, call: Call) -> bool:
        return True

    def on_state(self, call: Call) -> None:
        pass

    def on_output(self, call: Call, stream: int, data: bytes, offset: int) -> None:
        self._owner.on_output(stream, data)

    def on_item(self, call: Call, number: int, content: Content) -> None:
        self._add(content)

    def on_mark(self, call: Call, number: int) -> None:
        pass

    def on_done(self, call: Call) -> None:
        if call.result is not None and call.result_kind == "returned" and not call.spec.stream:
            self._add(call.result)
        self.is_over = True
        self._news.set()

    def _add(self, content: Content) -> None:
        self._parts.append(Part(content))
        self._news.set()


def exception_of(call: Call) -> dict[str, Any]:
    """The type of what the function raised, as Python shows it."""
    return {"exception": call.error_type.removeprefix("builtins.")} if call.error_type else {}
