"""Streams: how far a body may run ahead of its reader."""

from __future__ import annotations

import pytest

from remoted_client import wire
from tests.harness import Host

HEAD = """
import json, os, sys, time
from remoted_client import *
from remoted_client import remote, CpuLiveServerless, CpuLiveLoadBalancer
queue = CpuLiveServerless(name="queue", workersMax=1)
direct = CpuLiveLoadBalancer(name="direct", workersMax=1)
"""


@pytest.mark.parametrize("kind", ["queue", "direct"])
@pytest.mark.parametrize(("size", "most"), [(1 << 20, 17), (10, 65), (20 << 20, 2)])
def test_f21_at_most_64_items_and_16_mib_are_on_their_way(shared_daemon: Host, kind: str, size: int, most: int) -> None:
    trace = shared_daemon.project / f"ahead-{kind}-{size}"
    result = shared_daemon.run(
        HEAD
        + f"""
@remote({kind})
def produce(path):
    with open(path, "ab", buffering=0) as file:
        for n in range(100):
            file.write(b"x")
            yield bytes({size})
items = iter(produce({str(trace)!r}))
next(items)
before = -1
while os.path.getsize({str(trace)!r}) != before:
    before = os.path.getsize({str(trace)!r})
    time.sleep(0.5)
ahead = before - 1
print(json.dumps([ahead, sum(1 for _ in items) if {size} < 1 << 20 else 99]))
"""
    )
    ahead, rest = result.json
    assert 1 <= ahead <= most
    assert rest == 99
    assert size > wire.INLINE_BYTES or ahead >= 32, "it may run ahead"


def test_f21_a_stream_on_a_lease_passes_by_the_daemon(shared_daemon: Host) -> None:
    """The daemon is stopped, and the items come."""
    result = shared_daemon.run(
        HEAD
        + """
import signal
from remoted_client.connection import current
@remote(direct)
def count(n):
    for i in range(n): yield i
assert list(count(3)) == [0, 1, 2]
os.kill(current().daemon["pid"], signal.SIGSTOP)
try: print(json.dumps(list(count(500))))
finally: os.kill(current().daemon["pid"], signal.SIGCONT)
"""
    )
    assert result.json == list(range(500))


@pytest.mark.parametrize("plain", [True, False], ids=["def", "async def"])
def test_f21_leaving_the_loop_ends_the_body_at_its_next_yield(shared_daemon: Host, plain: bool) -> None:
    """Also of one that waits for its reader; the worker then takes the next call."""
    result = shared_daemon.run(
        HEAD
        + f"""
@remote(direct)
{"" if plain else "async "}def endless(path):
    try:
        n = 0
        while True:
            yield bytes(100_000) + bytes([n := (n + 1) % 250])
    finally:
        open(path, "w").close()
for path in ("left-1", "left-2"):
    for item in endless(os.path.abspath(path)):
        time.sleep(0.2 if path == "left-1" else 0)
        break
    while not os.path.exists(path): time.sleep(0.01)
from remoted_client.connection import current
print(json.dumps([len(os.listdir("/proc/self/fd")) < 30, current().segments.used_bytes]))
"""
    )
    assert result.json == [True, 0]


@pytest.mark.parametrize("plain", [True, False], ids=["def", "async def"])
def test_f25_a_stream_that_waits_for_its_reader_can_be_cancelled(shared_daemon: Host, plain: bool) -> None:
    result = shared_daemon.run(
        HEAD
        + f"""
@remote(direct)
{"" if plain else "async "}def endless(path):
    n = 0
    while True:
        open(path, "w").write(str(n))
        yield (n := n + 1)
handle = endless(os.path.abspath("at"))
items = iter(handle)
next(items)
before = ""
while not before or open("at").read() != before:
    before = open("at").read(); time.sleep(0.3)
began = time.monotonic()
handle.cancel()
try: seen = list(items)
except JobCancelled as error: print(json.dumps([type(error).__name__, time.monotonic() - began < 3]))
"""
    )
    assert result.json == ["JobCancelled", True]


def test_f21_a_stream_goes_on_while_others_wait_for_its_worker(shared_daemon: Host) -> None:
    """The lease is revoked in the middle: its turn is over when the stream is."""
    slow = shared_daemon.popen(
        HEAD
        + """
@remote(direct)
def count(n):
    for i in range(n): yield i
got = []
for item in count(300):
    got.append(item)
    if item == 0: print("going", flush=True)
    time.sleep(0.01)
print(json.dumps(got == list(range(300))))
print(json.dumps(list(count(3))))
"""
    )
    assert slow.stdout is not None
    assert slow.stdout.readline() == "going\n"
    other = shared_daemon.run(HEAD + "@remote(direct)\ndef f(x): return x\nprint(json.dumps(f(1).result()))")
    out, err = slow.communicate(timeout=60)

    assert other.json == 1
    assert out.splitlines() == ["true", "[0, 1, 2]"], err


def test_f21_what_was_read_stays_when_the_worker_dies(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
import signal
@remote(direct)
def dying():
    yield 1
    yield 2
    time.sleep(0.3)
    os.kill(os.getpid(), signal.SIGKILL)
    yield 3
got = []
try:
    for item in dying(): got.append(item)
except RemotedError as error: print(json.dumps([got, str(error)]))
"""
    )
    got, told = result.json
    assert got == [1, 2]
    assert "SIGKILL" in told


def test_f21_arrays_exceptions_and_unsendable_items(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
import numpy as np, threading
@remote(direct)
def arrays():
    for n in range(5): yield np.full(100_000, n)
@remote(direct)
def failing():
    yield 1
    raise KeyError("at the second")
@remote(direct)
def unsendable():
    yield 1
    yield threading.Lock()
sums = [int(a.sum()) for a in arrays()]
def told(stream):
    got = []
    try:
        for item in stream: got.append(item)
    except Exception as error: return [got, type(error).__name__, str(error)]
async def all_of(): return [int(a[0]) async for a in arrays()], [int(a[0]) for a in await arrays()]
import asyncio
print(json.dumps([sums, told(failing()), told(unsendable())[:2], asyncio.run(all_of()), len(arrays().result())]))
"""
    )
    sums, failed, unsendable, collected, count = result.json
    assert sums == [n * 100_000 for n in range(5)]
    assert failed == [[1], "KeyError", "'at the second'"]
    assert unsendable == [[1], "SerializationError"]
    assert collected == [[0, 1, 2, 3, 4]] * 2
    assert count == 5
