"""Samples, statistics, and the turn-taking that lets a noisy machine disturb everybody alike."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Scale:
    """How much of everything: the default, or ``quick`` for a test of the harness itself."""

    rounds: int = 5
    latency_calls: int = 200
    warmup_calls: int = 50
    turn_calls: int = 10
    jobs: int = 10_000
    map_rounds: int = 3
    cold_rounds: int = 5
    array_mib: int = 100
    array_rounds: int = 5
    idle_seconds: float = 4.0
    command_rounds: int = 7


QUICK = Scale(
    rounds=1, latency_calls=5, warmup_calls=2, turn_calls=1, jobs=20, map_rounds=1, cold_rounds=1, array_mib=1, array_rounds=1, idle_seconds=0.1, command_rounds=1
)


@dataclass(frozen=True)
class Contender:
    """Somebody who is measured. ``sample`` gives the samples of one round, in the bench's base unit."""

    name: str
    sample: Callable[[], list[float]]


@dataclass(frozen=True)
class Stats:
    """What became of one contender's samples, and each round's median: how noisy it was."""

    n: int
    p50: float
    p99: float
    low: float
    high: float
    rounds: list[float]

    def as_json(self) -> dict[str, Any]:
        return {"n": self.n, "p50": self.p50, "p99": self.p99, "min": self.low, "max": self.high, "round_medians": self.rounds}


def summarize(rounds: list[list[float]]) -> Stats:
    samples = sorted(sample for found in rounds for sample in found)
    last = samples[min(len(samples) - 1, math.ceil(len(samples) * 0.99) - 1)]
    return Stats(len(samples), statistics.median(samples), last, samples[0], samples[-1], [statistics.median(found) for found in rounds])


def interleave(contenders: list[Contender], rounds: int) -> dict[str, Stats]:
    """A B C, B C A, C A B, ...: every contender once a round, each round begun by another one."""
    found: dict[str, list[list[float]]] = {contender.name: [] for contender in contenders}
    for number in range(rounds):
        shift = number % len(contenders)
        for contender in contenders[shift:] + contenders[:shift]:
            found[contender.name].append(contender.sample())
    return {name: summarize(samples) for name, samples in found.items()}


def timed(action: Callable[[], Any]) -> float:
    began = time.perf_counter()
    action()
    return time.perf_counter() - began


def one(action: Callable[[], Any]) -> Callable[[], list[float]]:
    """A sampler of one duration a round."""
    return lambda: [timed(action)]


def many(action: Callable[[], Any], count: int, before: int = 0) -> Callable[[], list[float]]:
    """A sampler of ``count`` durations, one after another; so many calls ``before`` them are not counted, for others have had their turn and the caches."""

    def sample() -> list[float]:
        for _ in range(before):
            action()
        return [timed(action) for _ in range(count)]

    return sample


def rate(action: Callable[[], Iterable[Any]], count: int) -> Callable[[], list[float]]:
    """A sampler of results a second; the number of results is checked."""

    def sample() -> list[float]:
        began = time.perf_counter()
        got = sum(1 for _ in action())
        seconds = time.perf_counter() - began
        if got != count:
            raise RuntimeError(f"{got} results of {count}")
        return [count / seconds]

    return sample
