"""Others that run a function in another process: the standard pool, loky, and Ray where it is installed.

The standard pool starts its workers by ``spawn``: a fork of this process, with its threads, is no cold start.
"""

from __future__ import annotations

import importlib.util
import multiprocessing
import os
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import Executor, ProcessPoolExecutor
from typing import Any, Protocol

from benchmarks import bodies

NAMES = ("pool", "loky", "ray")
TITLES = {"pool": "ProcessPoolExecutor (spawn)", "loky": "loky.ProcessPoolExecutor", "ray": "Ray actor", "ray task": "Ray task"}
_NEEDS = {"pool": "concurrent.futures", "loky": "loky", "ray": "ray"}


def missing(name: str) -> bool:
    return importlib.util.find_spec(_NEEDS[name]) is None


class Peer(Protocol):
    """One worker of a peer's."""

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any: ...
    def map(self, function: Callable[..., Any], items: Iterable[Any]) -> Iterable[Any]: ...
    def close(self) -> None: ...


class ExecutorPeer:
    """The standard pool and loky have the same interface."""

    def __init__(self, executor: Executor) -> None:
        self._executor = executor

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._executor.submit(function, *arguments).result()

    def map(self, function: Callable[..., Any], items: Iterable[Any]) -> Iterable[Any]:
        return self._executor.map(function, items)

    def close(self) -> None:
        self._executor.shutdown(wait=True)


class RayPeer:
    """One Ray actor; ``task`` is the other way to call, through the scheduler."""

    def __init__(self) -> None:
        ray = _ray()
        self._ray = ray
        self._actor = ray.remote(num_cpus=0)(_Actor).remote()
        self._task = ray.remote(num_cpus=0)(bodies.noop)

    def call(self, function: Callable[..., Any], *arguments: Any) -> Any:
        return self._ray.get(self._actor.run.remote(function.__name__, *arguments))

    def task(self) -> Any:
        return self._ray.get(self._task.remote())

    def map(self, function: Callable[..., Any], items: Iterable[Any]) -> Iterable[Any]:
        waiting = [self._actor.run.remote(function.__name__, item) for item in items]
        return list(self._ray.get(waiting))

    def close(self) -> None:
        self._ray.kill(self._actor)


class _Actor:
    """Bodies by name: the function itself is not sent with each call, nor is ours."""

    def run(self, name: str, *arguments: Any) -> Any:
        return getattr(bodies, name)(*arguments)


def _ray() -> Any:
    """Ray, started once and left running, as our daemon is."""
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray  # type: ignore[import-not-found, unused-ignore]

    if not ray.is_initialized():
        ray.init(include_dashboard=False, logging_level="ERROR", log_to_driver=False, object_store_memory=1 << 30)
    return ray


def start(name: str) -> Peer:
    """A peer with one worker; the worker may start lazily, at the first call."""
    if name == "ray":
        return RayPeer()
    if name == "loky":
        import loky

        return ExecutorPeer(loky.ProcessPoolExecutor(max_workers=1))
    return ExecutorPeer(ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")))


def prepare(name: str) -> None:
    """What a user has paid for before the first cold start: imports, and Ray's own daemon."""
    if name == "ray":
        _ray()


def stop_all() -> None:
    """Ray's daemon, if this run started it."""
    ray = sys.modules.get("ray")
    if ray is not None and ray.is_initialized():
        ray.shutdown()
