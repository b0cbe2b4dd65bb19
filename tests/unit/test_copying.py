"""Copies of one user's payloads and everybody else's."""

from __future__ import annotations

import asyncio
import threading

from remoted.copying import Copying


def test_t58_large_payloads_of_one_user_hold_nobody_else_up() -> None:
    async def check() -> None:
        copying, gate = Copying(), threading.Event()
        slow = [asyncio.create_task(copying.do(1, lambda: gate.wait(20))) for _ in range(50)]
        try:
            assert await asyncio.wait_for(copying.do(2, lambda: 7), 20) == 7
            assert await asyncio.wait_for(asyncio.to_thread(lambda: 8), 20) == 8
        finally:
            gate.set()
        assert all(await asyncio.gather(*slow))

    asyncio.run(check())
