"""``Environments``: from a request to a Python that has what it asks for.

Called by the engine (``ensure``) and for ``remotectl env`` (``list``, ``prune``); it starts processes only through
the runner that it is given.

Two addresses. ``EnvironmentRequest.digest`` names what was asked; it is known at once and is what the scheduler
uses. ``Environment.key`` names what was built: requirements, interpreter, the site folders behind it and those of
the caller's versions that took part in the solution, which only a resolution can say. Several requests (another
spelling, another ``accelerate_downloads``) lead to one key; one request leads to another key after its caller
installed another version of something that took part.
"""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Protocol
from weakref import WeakValueDictionary

from remoted.access import Identity
from remoted.clock import Clock
from remoted.config import EnvironmentSettings
from remoted.environments import callers
from remoted.environments.build import Order, build
from remoted.environments.installer import Installer, Log, uv_environment
from remoted.environments.interpreter import Interpreter, Stamps, ask, stamps_of
from remoted.environments.request import EnvironmentFailed, EnvironmentRequest, normalise
from remoted.environments.running import HelperRunner
from remoted.environments.sharing import Shared
from remoted.environments.shelf import Built, EnvironmentEntry, Shelf


@dataclass(frozen=True, slots=True)
class Environment:
    """``python`` to start workers with and ``variables`` to give them; ``seconds`` is what building took, 0 when it was there."""

    key: str
    python: str
    built_now: bool
    seconds: float
    variables: dict[str, str] = field(default_factory=dict)


class EnvironmentSource(Protocol):
    """Where the engine gets environments: here, or from a process of each user's (``remoted.steward``)."""

    async def ensure(self, request: EnvironmentRequest, on_output: Callable[[bytes], None], environ: Mapping[str, str] | None = None) -> Environment: ...
    async def list(self, whose: Identity | None = None) -> tuple[EnvironmentEntry, ...]: ...
    async def prune(self, keep: set[str], unused_seconds: float, whose: Identity | None = None) -> tuple[str, ...]: ...
    async def close(self) -> None: ...


@dataclass(frozen=True, slots=True)
class _Answer:
    """What a request was answered with, for as long as the stamps hold."""

    built: Built
    stamps: Stamps


class Environments:
    """One user's environments in ``folder``; safe for any number of concurrent callers in one event loop."""

    def __init__(self, folder: Path, settings: EnvironmentSettings, run: HelperRunner, uv: Path | str, clock: Clock | None = None) -> None:
        self._shelf = Shelf(folder)
        self._settings = settings
        self._run = run
        self._uv = os.fspath(uv)
        self._clock = clock or Clock()
        self._answers: dict[str, _Answer] = {}
        self._interpreters: dict[str, Interpreter] = {}
        self._building: Shared[Environment] = Shared()
        self._families: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._active = 0

    async def ensure(
        self, request: EnvironmentRequest, on_output: Callable[[bytes], None], environ: Mapping[str, str] | None = None
    ) -> Environment:
        """The environment of ``request``, built if need be; ``on_output`` gets the installer's output.

        ``environ`` is the caller's: of it the variables about indexes, certificates and proxies reach uv. Raises
        EnvironmentFailed (nothing is left, the next call tries again). A cancelled last caller stops the build.
        """
        known = self._recall(request)
        if known is not None:
            return _environment(request, known)
        caller = dict(environ or {})
        return await self._building.run(request.digest, lambda tell: self._make(request, Log(tell), caller), on_output)

    def _recall(self, request: EnvironmentRequest) -> Built | None:
        """From memory, else from disk: no process is started. None when anything changed since."""
        digest = request.digest
        answer = self._answers.get(digest)
        if answer is None:
            found = self._shelf.recall(digest)
            if found is None:
                return None
            answer = self._answers[digest] = _Answer(*found)
        if stamps_of(answer.stamps) == answer.stamps and self._shelf.touch(answer.built, self._clock.wall()):
            return answer.built
        del self._answers[digest]
        return None

    async def _make(self, request: EnvironmentRequest, log: Log, caller: Mapping[str, str]) -> Environment:
        self._active += 1
        try:
            return await self._find_or_build(request, log, uv_environment(caller, request.accelerate_downloads))
        except OSError as error:
            raise EnvironmentFailed(f"cannot build the environment for {', '.join(request.requirements)}: {error}", log.text()) from error
        finally:
            self._active -= 1

    async def _find_or_build(self, request: EnvironmentRequest, log: Log, variables: dict[str, str]) -> Environment:
        began = self._clock.monotonic()
        requirements = normalise(request.requirements)
        interpreter = await self._ask(request.executable, variables, log)
        pinned = {} if request.isolated else callers.pinned(interpreter.packages)
        order = Order(request.uid, requirements, interpreter, request.isolated, pinned)
        lock = self._families.setdefault(order.family, asyncio.Lock())
        async with lock:  # a request that is spelled differently may be building the same
            built = self._shelf.find(order.family, order.versions)
            fresh = built is None or not self._shelf.touch(built, self._clock.wall())
            if built is None or fresh:
                built = await build(order, Installer(self._uv, self._run, self._settings, variables, log), self._shelf, log)
                self._shelf.touch(built, self._clock.wall())
        self._keep_answer(request, built, interpreter)
        found = _environment(request, built)
        return replace(found, built_now=True, seconds=self._clock.monotonic() - began) if fresh else found

    async def _ask(self, executable: str, variables: Mapping[str, str], log: Log) -> Interpreter:
        known = self._interpreters.get(executable)
        if known is None or stamps_of(known.stamps) != known.stamps:
            known = self._interpreters[executable] = await ask(executable, variables, self._run, log.write)
        return known

    def _keep_answer(self, request: EnvironmentRequest, built: Built, interpreter: Interpreter) -> None:
        chosen = [interpreter.executable] if request.isolated else list(interpreter.stamps)
        stamps = {path: interpreter.stamps[path] for path in chosen}
        self._answers[request.digest] = _Answer(built, stamps)
        self._shelf.remember(request.digest, built, stamps)

    # -- for remotectl env ---------------------------------------------------------------------------------

    async def list(self, whose: Identity | None = None) -> tuple[EnvironmentEntry, ...]:
        """The complete environments, the one used last first. All are one user's, whoever asks."""
        return await asyncio.to_thread(self._entries)

    def _entries(self) -> tuple[EnvironmentEntry, ...]:
        shelf = self._shelf
        found = [EnvironmentEntry(built.key, built.requirements, shelf.size_bytes(built), shelf.last_used(built)) for built in shelf.all()]
        return tuple(sorted(found, key=lambda entry: entry.last_used, reverse=True))

    async def prune(self, keep: set[str], unused_seconds: float, whose: Identity | None = None) -> tuple[str, ...]:
        """Remove what nobody used for so long, and leftovers of killed builds; returns the removed keys.

        ``keep`` holds the keys whose Python runs now.
        """
        before = self._clock.wall() - unused_seconds
        old = [built for built in self._shelf.all() if built.key not in keep and self._shelf.last_used(built) <= before]
        for built in old:  # without an await up to here: no ensure can hand one of them out in between
            self._shelf.withdraw(built.folder)
        self._answers = {digest: answer for digest, answer in self._answers.items() if answer.built not in old}
        folders = [built.folder for built in old]
        if self._active == 0:
            folders += self._shelf.leftovers() + self._shelf.old_scratch()
        await asyncio.to_thread(self._discard, folders)
        return tuple(built.key for built in old)

    async def close(self) -> None:
        """Nothing is held: a build ends with whoever waits for it."""

    def _discard(self, folders: Iterable[Path]) -> None:
        for folder in folders:
            self._shelf.discard(folder)
        self._shelf.forget_orphaned_requests()


def _environment(request: EnvironmentRequest, built: Built) -> Environment:
    return Environment(built.key, built.python, built_now=False, seconds=0.0, variables=_worker_variables(request, built))


def _worker_variables(request: EnvironmentRequest, built: Built) -> dict[str, str]:
    """What makes the hub's library download in parallel.

    huggingface_hub fails when told to use hf_transfer without having it, and newer versions know hf_xet only.
    """
    if not request.accelerate_downloads:
        return {}
    found = {"HF_XET_HIGH_PERFORMANCE": "1"}
    if "hf-transfer" in built.packages:
        found["HF_HUB_ENABLE_HF_TRANSFER"] = "1"
    return found
