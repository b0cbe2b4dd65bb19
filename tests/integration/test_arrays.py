"""Arrays and other large arguments and results of direct calls: right, writable, private, and not copied more than needed."""

from __future__ import annotations

import pytest

from tests.harness import Host, host

HEAD = """
import gc, json, os, signal, sys, time
import numpy as np
from remoted_client import *
from remoted_client import remote, CpuLiveLoadBalancer, CpuLiveServerless
from remoted_client.connection import current
one = CpuLiveLoadBalancer(name="one", workersMax=1)
@remote(one)
def echo(*values): return values if len(values) != 1 else values[0]
"""


def test_arrays_of_all_kinds_come_back_equal(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
base = np.arange(1_000_000, dtype=np.float64).reshape(1000, 1000)
kinds = [base, np.asfortranarray(base), base[::3, 5:], base.T, base.astype(">f4"), np.array([{"a": 1}, None], dtype=object),
         np.zeros(0), np.zeros((0, 7)), np.array(5), np.array(["x", "yy"] * 20_000), np.zeros(70_000, dtype=[("a", "i4"), ("b", "f8")])]
for number, array in enumerate(kinds):
    back = echo(array).result()
    assert back.dtype == array.dtype and back.shape == array.shape and (back == array).all(), number
    assert back.flags.writeable and (not back.size or back.flags.owndata or back.base is not None)
both = echo(base, base).result()
assert both[0] is both[1], "the same array twice stays one"
whole, part = echo(base, base[10:20]).result()
part[:] = -1
assert (whole == base).all()
print("ok")
"""
    )
    assert result.out.strip() == "ok"


def test_changes_are_seen_at_the_next_call_and_never_at_the_sender(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(one)
def spoil(x):
    before = float(x[0])
    x[:] = -1
    return before
a = np.zeros(200_000)
seen = []
for n in range(5):
    a[0] = n
    seen.append(spoil(a).result())
print(json.dumps([seen, float(a[0]), float(a[1])]))
"""
    )
    assert result.json == [[0, 1, 2, 3, 4], 4, 0]


def test_an_array_that_is_kept_stays_as_it_was(shared_daemon: Host) -> None:
    """At both ends: what is alive is never filled with something else."""
    result = shared_daemon.run(
        HEAD
        + """
kept = []
@remote(one)
def keep(x):
    kept.append(x)
    return [float(k[0]) for k in kept], x * 2
mine = []
for n in range(6):
    sums, doubled = keep(np.full(100_000, float(n))).result()
    mine.append(doubled)
time.sleep(0.6)
sums, _ = keep(np.full(100_000, 6.0)).result()
print(json.dumps([sums, [float(m[0]) for m in mine], [bool((m == m[0]).all()) for m in mine]]))
"""
    )
    assert result.json == [[0, 1, 2, 3, 4, 5, 6], [0, 2, 4, 6, 8, 10], [True] * 6]


def test_memory_is_used_again(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
a = np.zeros(1_000_000)
for n in range(30): assert len(echo(a).result()) == 1_000_000
used = current().segments.used_bytes
fds = len(os.listdir("/proc/self/fd"))
for n in range(30): assert len(echo(a).result()) == 1_000_000
print(json.dumps([current().segments.used_bytes == used, used < 50_000_000, len(os.listdir("/proc/self/fd")) == fds]))
"""
    )
    assert result.json == [True, True, True]


@pytest.mark.parametrize("size", [0, 1, 64 * 1024 - 1, 64 * 1024, 64 * 1024 + 1, 20_000_000])
def test_bytes_of_every_size(shared_daemon: Host, size: int) -> None:
    result = shared_daemon.run(
        HEAD
        + f"""
for kind in (bytes, bytearray):
    data = kind(os.urandom({size}))
    back = echo(data).result()
    assert back == data and type(back) is kind
    array = np.frombuffer(bytes(data), dtype=np.uint8)
    assert (echo(array).result() == array).all()
print("ok")
"""
    )
    assert result.out.strip() == "ok"


def test_a_worker_that_dies_with_arrays_in_hand(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(one)
def die(x): os.kill(os.getpid(), signal.SIGKILL)
a = np.ones(500_000)
for n in range(3):
    try: die(a).result()
    except WorkerLost: pass
print(json.dumps([float(echo(a).result().sum()), current().segments.used_bytes < 40_000_000]))
"""
    )
    assert result.json == [500_000, True]


def test_an_exception_with_an_array_comes_home(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
class Diverged(Exception): pass
@remote(one)
def fit():
    error = Diverged("at step 7")
    error.weights = np.ones(100_000)
    raise error
try: fit().result()
except Diverged as error: print(json.dumps([str(error), float(error.weights.sum())]))
"""
    )
    assert result.json == ["at step 7", 100_000]


def test_results_outlive_their_worker(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(one)
def make(): return np.full(500_000, 3.0), os.getpid()
found, pid = make().result()
os.kill(pid, signal.SIGKILL)
while os.path.exists(f"/proc/{pid}"): time.sleep(0.01)
print(json.dumps([bool((found == 3).all()), make().result()[1] != pid]))
"""
    )
    assert result.json == [True, True]


def test_f30_copy_gives_arrays_memory_of_their_own(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
a = np.arange(100_000.0)
back = echo.options(copy=True)(a).result()
queued = remote(CpuLiveServerless(name="q"))(lambda x: x.sum())
print(json.dumps([bool((back == a).all()), back.flags.writeable, current().segments.used_bytes, bool(queued.options(copy=True)(a).result().output == a.sum())]))
"""
    )
    assert result.json == [True, True, 0, True]


def test_arrays_of_queue_jobs_are_mapped_from_the_daemons_files(shared_daemon: Host) -> None:
    """Both ways, without a copy; what anybody writes into them stays his own, also from one attempt to the next."""
    result = shared_daemon.run(
        HEAD
        + """
queue = CpuLiveServerless(name="q", workersMax=1)
def mapped(array, name):
    at = array.__array_interface__["data"][0]
    for line in open("/proc/self/maps"):
        low, high = (int(word, 16) for word in line.split()[0].split("-"))
        if low <= at < high: return name in line
KEPT = []
@remote(queue, max_retries=1)
def twice(a, marker):
    if not os.path.exists(marker):
        a[:] = 7
        open(marker, "w").close()
        os._exit(1)
    KEPT.append(a)
    return mapped(a, "contents"), a.flags.writeable, 2 * a
@remote(queue)
def look_again(): return KEPT[0].sum()
@remote(queue)
def items():
    for n in range(3): yield np.full(50_000, n)
a = np.arange(200_000.0).reshape(400, 500)
job = twice(a, os.path.abspath("marker"))
in_worker, writeable, back = job.result().unwrap()
b = Job.from_id(job.id).result().unwrap()[2]
b[0] = -1
print(json.dumps([in_worker, writeable, mapped(back, ".result") and back.flags.writeable, bool((back == 2 * a).all()), bool(look_again().result().unwrap() == a.sum()),
    [int(item[0]) for item in items()], bool((twice.options(copy=True)(np.asfortranarray(a), "marker").result().unwrap()[2] == 2 * a).all())]))
"""
    )
    assert result.json == [True, True, True, True, True, [0, 1, 2], True]


def test_many_calls_with_arrays_at_once(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
import asyncio
three = CpuLiveLoadBalancer(name="three", workersMax=3)
@remote(three)
def double(x): return 2 * x
async def main(): return await asyncio.gather(*(double(np.full(50_000, float(n))) for n in range(40)))
print(json.dumps([bool((r == 2 * n).all()) for n, r in enumerate(asyncio.run(main()))]))
"""
    )
    assert result.json == [True] * 40


def test_more_arrays_than_a_message_can_carry_descriptors(shared_daemon: Host) -> None:
    """They share one segment (SCM_MAX_FD is 253)."""
    result = shared_daemon.run(
        HEAD
        + """
many = [np.full(5000, n) for n in range(600)]
back = echo(many).result()
print(all(np.array_equal(a, b) for a, b in zip(many, back)) and len(back) == 600)
"""
    )
    assert result.out.strip() == "True"


def test_clients_that_are_killed_with_arrays_in_hand_cost_the_worker_nothing(shared_daemon: Host) -> None:
    script = shared_daemon.write(
        "killed.py",
        HEAD
        + """
@remote(one)
def memory(): return os.getpid(), sum("memfd" in os.readlink(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd") if os.path.exists(f"/proc/self/fd/{fd}"))
if sys.argv[1:]:
    kept = [echo(np.full(1 << 20, n)).result() for n in range(5)]
    os.kill(os.getpid(), signal.SIGKILL)
import subprocess
def killed(times):
    for _ in range(times):
        assert subprocess.run([sys.executable, __file__, "die"]).returncode == -signal.SIGKILL
killed(3)
before = memory().result()
killed(8)
after = memory().result()
print(json.dumps([before[0] == after[0], after[1] <= before[1] + 1]))
""",
    )
    assert shared_daemon.run(script, timeout=100).json == [True, True]


def test_t21_a_client_whose_memory_could_shrink_is_refused_and_the_next_one_works(shared_daemon: Host) -> None:
    """It has left the seals out, so that it could cut the memory off under the worker's hands."""
    hostile = shared_daemon.run(
        HEAD
        + """
from remoted_client import segments
segments._SEALS = 0
try: echo(np.ones(1 << 16)).result()
except Exception as error: print(type(error).__name__, error)
"""
    )
    assert "their memory could change its size" in hostile.out
    assert shared_daemon.run(HEAD + "print(echo(np.ones(1 << 16)).result().sum())").out.strip() == "65536.0"


def test_turns_end_between_large_transfers_without_harm() -> None:
    """Two processes share one worker in turns far shorter than what they send takes."""
    with host("[limits]\nlease_turn_seconds = 0.01\n") as crowded:
        crowded.start()
        script = crowded.write(
            "turns.py",
            HEAD
            + """
@remote(one)
def total(x): return x.sum()
print(all(total(np.full(1 << 21, n)).result() == n << 21 for n in range(25)))
""",
        )
        runs = [crowded.popen(script) for _ in range(2)]
        ends = [run.communicate(timeout=100) for run in runs]
        assert [out.strip() for out, _ in ends] == ["True", "True"], ends


def test_f25_tasks_that_are_cancelled_at_any_moment_harm_no_other_call(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
import asyncio, random
@remote(CpuLiveLoadBalancer(name="any", workersMax=2))
async def later(x):
    await asyncio.sleep(0.005)
    return x
async def call(n): return (await later(np.full(1 << 14, n)))[0]
async def main():
    chance = random.Random(1)
    for n in range(120):
        task = asyncio.create_task(call(n))
        await asyncio.sleep(chance.random() * 0.02)
        task.cancel()
        try: assert await task == n
        except asyncio.CancelledError: pass
    return [int(value) for value in await asyncio.gather(*map(call, range(20)))]
print(json.dumps(asyncio.run(main())))
""",
        timeout=100,
    )
    assert result.json == list(range(20))
