"""The daemon's side of stewards: one for each identity that needs environments, started when asked for, let go when idle."""

from __future__ import annotations

import asyncio
import contextlib
import os
import secrets
import signal
import sys
from collections.abc import Callable, Mapping
from typing import Any

from remoted import channel
from remoted.access import Identity
from remoted.cgroup import Bounds, Groups
from remoted.config import EnvironmentSettings
from remoted.environments import Environment, EnvironmentEntry, EnvironmentFailed, EnvironmentRequest
from remoted.errors import SpawnError
from remoted.family import Family
from remoted.peers import take_no_descriptors
from remoted.spawn import launch, reaper
from remoted.spawn.becoming import Becoming
from remoted.steward import words
from remoted_client import wire

_PROGRAM = (sys.executable, "-I", "-B", "-m", "remoted.steward.program")
_LAUNCH_SECONDS = 30.0
_ANSWER_SECONDS = 60.0
_IDLE_SECONDS = 60.0
_CLOSE_SECONDS = 5.0
_WORDS_BYTES = 4000
#: Compilers in parallel, and their threads.
_TASKS = 4096
_ENVIRON = {"PATH": "/usr/local/bin:/usr/bin:/bin", "LANG": "C.UTF-8"}
_Listener = Callable[[bytes], None]


class Stewards:
    """``EnvironmentSource`` for many users."""

    def __init__(self, settings: EnvironmentSettings, uv: str, become: Callable[[Identity], Becoming], cgroups: Groups | None = None) -> None:
        self._settings = settings
        self._uv = uv
        self._become = become
        self._cgroups = cgroups
        self._known: dict[Identity, _Steward] = {}

    async def ensure(self, request: EnvironmentRequest, on_output: _Listener, environ: Mapping[str, str] | None = None) -> Environment:
        """As ``Environments.ensure``, by the caller's steward."""
        assert request.identity is not None
        caller = dict(environ or {})
        steward = self._find(request.identity)
        try:
            return words.to_environment(await steward.ask("ensure", words.from_request(request, caller), on_output, self._settings.build_deadline_seconds + _ANSWER_SECONDS))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise EnvironmentFailed(f"cannot use the environment: what its steward says is garbled ({error})") from error

    async def list(self, whose: Identity | None = None) -> tuple[EnvironmentEntry, ...]:
        """One user's. Raises EnvironmentFailed."""
        assert whose is not None
        return words.to_entries(await self._find(whose).ask("list", {}, _ignore, _ANSWER_SECONDS))

    async def prune(self, keep: set[str], unused_seconds: float, whose: Identity | None = None) -> tuple[str, ...]:
        """One user's. Raises EnvironmentFailed."""
        assert whose is not None
        answer = await self._find(whose).ask("prune", {"unused_seconds": unused_seconds}, _ignore, _ANSWER_SECONDS)
        return tuple(map(str, answer["removed"]))

    def _find(self, identity: Identity) -> _Steward:
        """A living one. Several who ask at once share the one that is being started."""
        found = self._known.get(identity)
        if found is None or not found.is_open:
            begin = {"settings": self._settings.model_dump(mode="json"), "uv": self._uv}
            family = self._make_family(identity)
            becoming = self._become(identity).inside(family.group)
            found = self._known[identity] = _Steward(becoming, family, begin, lambda: self._forget(identity))
        return found

    def _make_family(self, identity: Identity) -> Family:
        """Whatever an installer starts ends with its steward."""
        name = f"steward-{secrets.token_hex(8)}"
        try:
            return Family(name, self._cgroups.make(name, Bounds(tasks=_TASKS)) if self._cgroups is not None else None, uid=identity.uid)
        except OSError as error:
            raise EnvironmentFailed(f"cannot look after your environments: no cgroup can be made for their steward: {error}") from error

    def _forget(self, identity: Identity) -> None:
        known = self._known.get(identity)
        if known is not None and not known.is_open:
            del self._known[identity]

    async def close(self) -> None:
        """All of them end, with whatever they are building; who cannot die is left."""
        ending = [asyncio.ensure_future(steward.end()) for steward in self._known.values()]
        if ending:
            _, late = await asyncio.wait(ending, timeout=_CLOSE_SECONDS)
            for task in late:
                task.cancel()


class _Steward:
    """One process and the questions that it has not answered yet."""

    def __init__(self, becoming: Becoming, family: Family, begin: dict[str, Any], on_over: Callable[[], None]) -> None:
        self.is_open = True
        self._becoming = becoming
        self._family = family
        self._on_over = on_over
        self._loop = asyncio.get_running_loop()
        self._asked: dict[int, tuple[asyncio.Future[dict[str, Any]], _Listener]] = {}
        self._number = 0
        self._channel: channel.Channel | None = None
        self._process: launch.Process | None = None
        self._words = -1
        self._gone: asyncio.Future[None] = self._loop.create_future()
        self._idle: asyncio.TimerHandle | None = None
        self._started = self._loop.create_task(self._start(begin))

    async def ask(self, op: str, document: dict[str, Any], listener: _Listener, deadline_seconds: float) -> dict[str, Any]:
        """Raises EnvironmentFailed: it could not, does not answer, or has ended."""
        self._busy()
        await asyncio.shield(self._started)
        return await self._ask(op, document, listener, deadline_seconds)

    async def _ask(self, op: str, document: dict[str, Any], listener: _Listener, deadline_seconds: float) -> dict[str, Any]:
        if self._channel is None or not self._channel.is_open:
            raise EnvironmentFailed("cannot look after your environments: their steward has ended; try again")
        self._number += 1
        number = self._number
        answer: asyncio.Future[dict[str, Any]] = self._loop.create_future()
        self._asked[number] = (answer, listener)
        self._channel.send({"op": op, "number": number}, words.pack(document))
        try:
            return await asyncio.wait_for(answer, deadline_seconds)
        except asyncio.CancelledError:
            self._channel.send({"op": "cancel", "number": number}, b"{}")
            raise
        except TimeoutError:
            await self.end()
            raise EnvironmentFailed(f"cannot look after your environments: no answer within {deadline_seconds:g} s") from None
        finally:
            self._asked.pop(number, None)
            self._rest()

    # -- life ----------------------------------------------------------------------------------------------

    async def _start(self, begin: dict[str, Any]) -> None:
        ours, theirs = channel.pair()
        take_no_descriptors(ours)
        self._channel = channel.Channel(ours, self._on_frame, self._on_closed)
        self._words, said = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            spec = launch.LaunchSpec((*_PROGRAM, str(theirs.fileno())), _ENVIRON, said, said, (theirs.fileno(),), self._becoming)
            self._process = await launch.launch(spec, _LAUNCH_SECONDS)
        except SpawnError as error:
            self._family.forget()
            self._over()
            raise EnvironmentFailed(f"cannot look after your environments: {error}") from error
        finally:
            theirs.close()
            os.close(said)
        self._family.pid = self._process.pid
        self._loop.add_reader(self._process.pidfd, self._on_exit)
        await self._ask("begin", begin, _ignore, _ANSWER_SECONDS)

    def _busy(self) -> None:
        if self._idle is not None:
            self._idle.cancel()
            self._idle = None

    def _rest(self) -> None:
        self._busy()
        if not self._asked and self.is_open:
            self._idle = self._loop.call_later(_IDLE_SECONDS, self._let_go)

    def _let_go(self) -> None:
        """At the end of its channel it ends by itself."""
        self.is_open = False
        if self._channel is not None:
            self._channel.close()

    def _on_frame(self, frame: wire.Frame) -> None:
        frame.close()
        number = frame.header.get("number")
        answer, listener = self._asked.get(number if isinstance(number, int) else 0, (None, _ignore))
        if answer is None or answer.done():
            return
        try:
            if frame.op == "output":
                listener(frame.body)
            elif frame.op == "done":
                answer.set_result(words.unpack(frame.body))
            else:
                document = words.unpack(frame.body)
                answer.set_exception(EnvironmentFailed(str(document["message"]), str(document["log"])))
        except (ValueError, KeyError, TypeError) as error:
            answer.set_exception(EnvironmentFailed(f"cannot look after your environments: their steward's answer is garbled ({error})"))

    def _on_closed(self, why: str) -> None:
        self.is_open = False
        if self._process is not None:
            reaper.send(self._process.pidfd, signal.SIGTERM)

    def _on_exit(self) -> None:
        assert self._process is not None
        self._loop.remove_reader(self._process.pidfd)
        self._loop.create_task(self._bury(self._process))

    async def _bury(self, process: launch.Process) -> None:
        """What it was building dies with it."""
        status = reaper.reap(process.pidfd)
        os.close(process.pidfd)
        self._process = None
        await self._family.bury()
        said = b""
        with contextlib.suppress(OSError):
            said = os.read(self._words, _WORDS_BYTES)
        text = said.decode("utf-8", "replace").strip()
        self._fail(f"cannot look after your environments: their steward {status.describe()}" + (f"\n{text}" if text else ""))
        self._over()

    def _fail(self, why: str) -> None:
        for answer, _ in self._asked.values():
            if not answer.done():
                answer.set_exception(EnvironmentFailed(why))

    def _over(self) -> None:
        self.is_open = False
        self._busy()
        if self._channel is not None:
            self._channel.close()
        if self._words >= 0:
            os.close(self._words)
            self._words = -1
        if not self._gone.done():
            self._gone.set_result(None)
        self._on_over()

    async def end(self) -> None:
        """Returns when it is dead."""
        with contextlib.suppress(EnvironmentFailed, asyncio.CancelledError):
            await asyncio.shield(self._started)
        self._let_go()
        if self._process is not None:
            reaper.send(self._process.pidfd, signal.SIGKILL)
            await self._gone


def _ignore(data: bytes) -> None:
    """Output that nobody reads."""
