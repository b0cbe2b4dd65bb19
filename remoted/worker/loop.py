"""The one event loop of a worker, made when it is first needed: asyncio is a third of what a plain interpreter needs to start."""

from __future__ import annotations

import sys
from collections.abc import Coroutine
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import asyncio


class WarmLoop:
    """Objects that are kept warm belong to it, so it lives as long as the worker. Made and run by the main thread only."""

    def __init__(self) -> None:
        self.made: asyncio.AbstractEventLoop | None = None
        #: An async body has run: something may be going on there between two calls.
        self.is_used = False

    def get(self) -> asyncio.AbstractEventLoop:
        """From now on the main thread's."""
        if self.made is None:
            import asyncio

            self.made = asyncio.new_event_loop()
            asyncio.set_event_loop(self.made)
        return self.made

    def offer(self) -> None:
        """To a sync body that may ask asyncio for the thread's loop: one whose modules have imported it."""
        if self.made is None and "asyncio" in sys.modules:
            self.get()

    # -- the main thread runs it ---------------------------------------------------------------------------

    def start(self, body: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
        """A body begins when the loop next runs."""
        self.is_used = True
        return self.get().create_task(body)

    def run(self, work: Coroutine[Any, Any, Any]) -> Any:
        """To its end, and with it whatever else is on the loop."""
        return self.get().run_until_complete(work)

    def finish(self, tasks: list[asyncio.Task[None]]) -> None:
        """Run until all of these have ended."""
        import asyncio

        self.run(asyncio.wait(tasks))

    async def readable(self, fd: int) -> None:
        """Until there is something to read."""
        import asyncio

        loop, arrived = self.get(), asyncio.Event()
        loop.add_reader(fd, arrived.set)
        try:
            await arrived.wait()
        finally:
            loop.remove_reader(fd)

    # -- what is on it -------------------------------------------------------------------------------------

    def has_work(self) -> bool:
        """Did a body leave tasks behind?"""
        if not self.is_used:
            return False
        import asyncio

        return bool(asyncio.all_tasks(self.get()))

    def running_task(self) -> asyncio.Task[Any] | None:
        """The one that is at work in this moment; safe in a signal handler."""
        if self.made is None:
            return None
        import asyncio

        return asyncio.current_task(self.made)

    # -- another thread ------------------------------------------------------------------------------------

    def run_beside(self, body: Coroutine[Any, Any, None]) -> None:
        """On this loop while it runs, and then without waiting; else here, on one that ends with the body."""
        import asyncio

        if self.made is not None and self.made.is_running():
            asyncio.run_coroutine_threadsafe(body, self.made)
        else:
            asyncio.run(body)
