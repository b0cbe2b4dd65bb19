"""Short durable calls that a worker has already while it runs another one: nobody may notice but by the clock (decision 0030)."""

from __future__ import annotations

import pytest

from tests.harness import Host

HEAD = """
import asyncio, json, os, signal, subprocess, sys, time
from remoted_client import *
from remoted_client import remote, context, as_completed, CpuLiveServerless
one = CpuLiveServerless(name="one", workersMax=1)
two = CpuLiveServerless(name="two", workersMax=2)
def warm(function, *more):
    "After some of them the daemon knows that they are short."
    for _ in range(3): list(function.map([0] * 40, *more))
"""


def test_f22_what_short_calls_print_is_each_ones_own(daemon: Host) -> None:
    """By Python, past Python, and by a child process."""
    result = daemon.run(
        HEAD
        + """
@remote(one)
def speak(n):
    if n % 7 == 0: os.write(1, f"raw {n}\\n".encode())
    elif n % 11 == 0: subprocess.run(["echo", "child", str(n)])
    elif n % 2: print("python", n)
warm(speak)
wrong = []
for n, o in enumerate(speak.map(range(300))):
    expected = f"raw {n}\\n" if n % 7 == 0 else f"child {n}\\n" if n % 11 == 0 else f"python {n}\\n" if n % 2 else ""
    if o.stdout != expected: wrong.append((n, o.stdout))
print(json.dumps(wrong))
"""
    )
    assert result.json == []


def test_f24_a_worker_that_dies_costs_only_the_call_that_it_was_at(daemon: Host) -> None:
    result = daemon.run(
        HEAD
        + """
@remote(one, max_retries=0)
def body(n, marks):
    with open(marks, "a") as file: file.write(f"{n}\\n")
    if n in (50, 111): os.kill(os.getpid(), signal.SIGKILL)
    return n
warm(body, [os.devnull] * 40)
outputs = list(body.map(range(200), ["marks"] * 200))
print(json.dumps([[n, o.status, o.state_reason, o.attempts] for n, o in enumerate(outputs) if (o.status, o.attempts) != ("COMPLETED", 1)]))
ran = [int(line) for line in open("marks").read().split()]
print(json.dumps([sorted(ran) == list(range(200)), len(ran)]), file=sys.stderr)
""",
        PYTHONWARNINGS="default",
    )
    assert result.json == [[50, "FAILED", "WORKER_DIED", 1], [111, "FAILED", "WORKER_DIED", 1]]
    assert "[true, 200]" in result.err, result.err


def test_f03_a_call_that_lasts_keeps_nobody_waiting_behind_it(daemon: Host) -> None:
    """Those that its worker had been given go to the other worker, in order, and it is not interrupted."""
    result = daemon.run(
        HEAD
        + """
@remote(two)
def body(n):
    if n == 30: time.sleep(3)
    return n
warm(body)
handles = [body(n) for n in range(200)]
ended = [h.result().output for h in as_completed(handles)]
print(json.dumps([ended[-1], sorted(ended) == list(range(200))]))
"""
    )
    assert result.json == [30, True]


@pytest.mark.parametrize("kind", ["def", "async def"])
def test_f25_calls_behind_one_that_lasts_can_be_cancelled(daemon: Host, kind: str) -> None:
    pause = "while not os.path.exists('go'): time.sleep(0.01)" if kind == "def" else "while not os.path.exists('go'): await asyncio.sleep(0.01)"
    result = daemon.run(
        HEAD
        + f"""
@remote(one)
{kind} body(n):
    if n == 1:
        open("begun", "w").close()
        {pause}
    return n
warm(body)
handles = [body(n) for n in [1, *range(2, 60)]]
while not os.path.exists("begun"): time.sleep(0.001)
for h in handles[1:]: h.cancel()
ends = [h.result() for h in handles[1:]]
open("go", "w").close()
print(json.dumps([handles[0].result().status, *sorted({{(o.status, o.attempts) for o in ends}})]))
""",
        PYTHONWARNINGS="default",
    )
    assert result.json == ["COMPLETED", ["CANCELLED", 0]]


def test_f02_async_bodies_do_not_begin_beside_each_other(daemon: Host) -> None:
    result = daemon.run(
        HEAD
        + """
running = 0
@remote(one)
async def body(n):
    global running
    running += 1
    seen = running
    await asyncio.sleep(0)
    running -= 1
    return seen
warm(body)
print(json.dumps(sorted({o.output for o in body.map(range(200))})))
"""
    )
    assert result.json == [1]


def test_f29_short_calls_with_nested_ones_among_them_all_end(daemon: Host) -> None:
    result = daemon.run(
        HEAD
        + """
@remote(one)
def inner(n): return n
@remote(one)
def outer(n): return inner(n).result().output if n % 40 == 1 else n
warm(outer)
print(json.dumps([[o.output for o in outer.map(range(200))] == list(range(200)) for _ in range(5)]))
"""
    )
    assert result.json == [True] * 5


def test_f24_the_timeout_of_a_short_call_counts_from_its_own_beginning(daemon: Host) -> None:
    result = daemon.run(
        HEAD
        + """
@remote(one, timeout=2, max_retries=0)
def body(n):
    time.sleep({10: 1.5, 11: 1.5, 12: 30}.get(n, 0))
    return n
warm(body)
print(json.dumps([[n, o.status] for n, o in enumerate(body.map(range(20))) if o.status != "COMPLETED"]))
"""
    )
    assert result.json == [[12, "TIMED_OUT"]]


def test_f04_calls_of_a_map_are_not_held_for_those_that_its_iterable_has_not_given_yet(daemon: Host) -> None:
    """Calls that are made together share frames; this iterable goes on when the call before has run."""
    result = daemon.run(
        HEAD
        + """
@remote(one)
def body(n):
    open(f"ran-{n}", "w").close()
    return n
def slow():
    for n in range(5):
        yield n
        while not os.path.exists(f"ran-{n}"): time.sleep(0.005)
print(json.dumps([o.output for o in body.map(slow())]))
"""
    )
    assert result.json == list(range(5))
