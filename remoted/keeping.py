"""Items of streams on their way into the store: a small one is a row at once, a large one first a file, and their order stays.

A stream that finds no room for one is stopped: it has no end that could be told."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from functools import partial
from typing import Any

from remoted.attempts import Content
from remoted.blobs import Blobs
from remoted.calls import Call
from remoted.docket import Docket
from remoted.errors import RemotedError
from remoted.model import Reason
from remoted.quotas import Quotas
from remoted.replies import close_payload
from remoted_client import wire

#: Far more than a worker has on its way (``stream_items``), and more than it repeats, once again at each of some restarts. One that sends more fills memory, and the store's line.
_UNSTORED_MOST = 1024
#: Rows stay in memory for as long as their call lives: beyond this much items are files, however small.
_INLINE_MOST = 4 << 20
_Spawn = Callable[[Coroutine[Any, Any, None]], "asyncio.Task[None]"]


class ItemKeeper:
    """``kept`` is called once an item is stored, ``again`` with what to call later where the store did not take it."""

    def __init__(self, docket: Docket, blobs: Blobs, quotas: Quotas, spawn: _Spawn, kept: Callable[[Call, int], None], again: Callable[..., None]) -> None:
        self._docket = docket
        self._blobs = blobs
        self._quotas = quotas
        self._spawn = spawn
        self._kept = kept
        self._again = again
        #: The newest of each stream that is not in the store's line yet.
        self._under_way: dict[str, asyncio.Task[None]] = {}

    def add(self, call: Call, number: int, payload: bytes | int, size: int) -> None:
        """The payload is this object's from here on."""
        if call.items.unstored >= _UNSTORED_MOST and call.worker is not None:
            close_payload(payload)
            call.worker.break_off(f"{call.items.unstored} items are not stored yet, and it sends more")
            return
        if isinstance(payload, bytes) and payload and call.items.inline_bytes + len(payload) > _INLINE_MOST:
            payload = wire.memfd("remoted-item", payload)
        if problem := call.items.problem or self._quotas.refusal(call.uid, size):
            close_payload(payload)
            self._fail(call, problem)
            return
        self._quotas.add(call.uid, size)
        before = self._under_way.get(call.id)
        if isinstance(payload, int) or before is not None:
            self._under_way[call.id] = task = self._spawn(self._keep_large(call, number, payload, size, before))
            task.add_done_callback(lambda _: self._under_way.pop(call.id) if self._under_way.get(call.id) is task else None)
        else:
            self._keep(call, number, payload, size)
        call.items.add(Content("", payload, None) if isinstance(payload, bytes) else Content("", None, str(self._blobs.item_path(call.id, number))))

    def under_way(self, call: Call) -> asyncio.Task[None] | None:
        """What has to end before the end of the stream can be told."""
        return self._under_way.get(call.id)

    async def _keep_large(self, call: Call, number: int, payload: bytes | int, size: int, before: asyncio.Task[None] | None) -> None:
        """Or one behind such."""
        if before is not None:
            await asyncio.wait([before])
        if isinstance(payload, int):
            try:
                await self._blobs.store_descriptor(call.uid, payload, self._blobs.item_path(call.id, number))
            except RemotedError as error:
                self._fail(call, error)
        if call.items.problem is None:
            self._keep(call, number, payload, size)

    def _fail(self, call: Call, problem: RemotedError) -> None:
        call.items.problem = problem
        if call.worker is not None:
            call.worker.stop(call.token, Reason.RESULT_LOST)

    def _keep(self, call: Call, number: int, payload: bytes | int, size: int) -> None:
        self._docket.add_item(call, number, size, payload if isinstance(payload, bytes) else None, partial(self._stored, number, payload, size))

    def _stored(self, number: int, payload: bytes | int, size: int, call: Call, error: Exception | None) -> None:
        if error is not None:
            self._again(error, self._keep, call, number, payload, size)
        else:
            self._kept(call, number)
