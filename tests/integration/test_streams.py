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
