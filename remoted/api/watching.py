"""Waiting for a call without asking again and again: a watcher that sets an event."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Iterator

from remoted.attempts import Content
from remoted.calls import Call


class NewsWatcher:
    """Sets ``news`` when anything happens to the call; ``is_over`` once it has ended."""

    def __init__(self) -> None:
        self.news = asyncio.Event()
        self.over = asyncio.Event()

    @property
    def is_over(self) -> bool:
        return self.over.is_set()

    def owns(self, call: Call) -> bool:
        return False

    def on_state(self, call: Call) -> None:
        self.news.set()

    def on_output(self, call: Call, stream: int, data: bytes, offset: int) -> None:
        self.news.set()

    def on_item(self, call: Call, number: int, content: Content) -> None:
        self.news.set()

    def on_mark(self, call: Call, number: int) -> None:
        pass

    def on_done(self, call: Call) -> None:
        self.over.set()
        self.news.set()


@contextlib.contextmanager
def watching(call: Call) -> Iterator[NewsWatcher]:
    """A watcher of this live call, for as long as the block runs."""
    watcher = NewsWatcher()
    call.watchers.add(watcher)
    try:
        yield watcher
    finally:
        call.watchers.discard(watcher)
