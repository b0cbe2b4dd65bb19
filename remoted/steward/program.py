"""The steward: keeps one user's environments, as that user, for as long as the daemon holds the other end of its channel."""

from __future__ import annotations

import asyncio
import os
import pwd
import socket
import sys
from collections.abc import Awaitable
from pathlib import Path
from typing import Any

from remoted.channel import Channel
from remoted.config import EnvironmentSettings
from remoted.environments import EnvironmentFailed, Environments
from remoted.errors import RemotedError
from remoted.paths import own_directory, user_paths
from remoted.spawn import helper, reaper
from remoted.steward import words
from remoted_client import wire


class Steward:
    """Answers one question after the other, or several at once."""

    def __init__(self, sock: socket.socket) -> None:
        self._channel = Channel(sock, self._on_frame, self._on_closed)
        self._over = asyncio.Event()
        self._tasks: dict[int, asyncio.Task[None]] = {}
        self._environments: Environments | None = None
        self._settings, self._uv = EnvironmentSettings(), "uv"

    async def serve(self) -> None:
        """Until the daemon lets go; what is being built then is given up."""
        await self._over.wait()
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _on_closed(self, why: str) -> None:
        self._over.set()

    def _on_frame(self, frame: wire.Frame) -> None:
        number = frame.header["number"]
        if frame.op == "cancel":
            if number in self._tasks:
                self._tasks[number].cancel()
            return
        document = words.unpack(frame.body)
        task = self._tasks[number] = asyncio.get_running_loop().create_task(self._answer(number, self._do(frame.op, number, document)))
        task.add_done_callback(lambda _: self._tasks.pop(number, None))

    async def _answer(self, number: int, work: Awaitable[dict[str, Any]]) -> None:
        try:
            answer = await work
        except (RemotedError, OSError, ValueError) as error:
            self._channel.send({"op": "failed", "number": number}, words.pack(words.from_failure(error)))
        else:
            self._channel.send({"op": "done", "number": number}, words.pack(answer))

    async def _do(self, op: str, number: int, document: dict[str, Any]) -> dict[str, Any]:
        if op == "begin":
            self._settings, self._uv = EnvironmentSettings.model_validate(document["settings"]), document["uv"]
            return {}
        environ = document.get("environ", {})
        environments = self._open(environ.get("HOME", ""))
        if op == "ensure":
            if environments is None:
                raise ValueError("cannot keep environments for you: you have no account on this host, and HOME is no folder of yours")
            request = words.to_request(os.geteuid(), document)
            return words.from_environment(await environments.ensure(request, lambda data: self._tell(number, data), environ))
        if op == "list":
            return words.from_entries(await environments.list() if environments else ())
        return {"removed": await environments.prune(set(), document["unused_seconds"]) if environments else ()}

    def _open(self, told: str) -> Environments | None:
        """This user's. ``told``: the caller's HOME, which counts for who has no account; without either there are none."""
        home = _home(told)
        if self._environments is None and home:
            folder = user_paths({"HOME": home}).environments
            try:
                own_directory(folder)
            except OSError as error:
                raise EnvironmentFailed(f"cannot keep environments in {folder}: {error.strerror}; that folder must be yours") from error
            self._environments = Environments(folder, self._settings, helper.run_helper, self._uv)
        return self._environments

    def _tell(self, number: int, data: bytes) -> None:
        for start in range(0, len(data), wire.INLINE_BYTES):
            self._channel.send({"op": "output", "number": number}, data[start : start + wire.INLINE_BYTES])


def _home(told: str) -> str:
    """The account's own, else what the caller's environment says, else ""."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        return told if Path(told).is_absolute() else ""


def main() -> None:
    """``argv[1]``: the descriptor of the channel."""
    os.umask(0o077)
    reaper.become_subreaper()
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)

    async def serve() -> None:
        await Steward(sock).serve()

    asyncio.run(serve())


if __name__ == "__main__":
    main()
