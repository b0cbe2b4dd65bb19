"""Direct calls on the client's own connection, handed to a worker (MECHANISMS 3)."""

from __future__ import annotations

import json
import signal
import time

from tests.harness import Host, wait_until

HEAD = """
import asyncio, json, os, signal, sys, threading, time
from remoted_client import *
from remoted_client import remote, CpuLiveLoadBalancer, CpuLiveServerless
from remoted_client.connection import current
one = CpuLiveLoadBalancer(name="one", workersMax=1)
three = CpuLiveLoadBalancer(name="three", workersMax=3)
def leases(): return [lease for pool in current().pools.values() for lease in pool._leases]
"""


def test_a_warm_call_passes_by_the_daemon(shared_daemon: Host) -> None:
    """The daemon is stopped, and the calls go on."""
    result = shared_daemon.run(
        HEAD
        + """
@remote(one)
def double(x): return 2 * x
daemon = double(1).result() and current().daemon["pid"]
double(1).result()
os.kill(daemon, signal.SIGSTOP)
try: print(json.dumps([double(n).result(5) for n in range(200)]))
finally: os.kill(daemon, signal.SIGCONT)
"""
    )
    assert result.json == [2 * n for n in range(200)]


def test_code_and_surroundings_go_to_a_worker_once(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
import remoted_client.lease as module
sent = []
send = module.wire.send
def counting(sock, data, fds=(), flags=0):
    sent.append((len(data), len(fds)))
    return send(sock, data, fds, flags)
module.wire.send = counting
TABLE = list(range(5000))
@remote(one)
def look(i): return TABLE[i]
look(0).result(); look(1).result()
sent.clear()
for n in range(50): assert look(n).result() == n
print(json.dumps([len(sent), max(size for size, _ in sent), sum(fds for _, fds in sent)]))
"""
    )
    count, largest, descriptors = result.json
    assert (count, descriptors) == (50, 0)
    assert largest < 100


def test_gather_of_fifty_on_three_workers(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(three)
def f(x):
    time.sleep(0.02)
    return x, os.getpid()
async def main(): return await asyncio.gather(*(f(n) for n in range(50)))
found = asyncio.run(main())
print(json.dumps([[x for x, _ in found], len({pid for _, pid in found})]))
"""
    )
    assert result.json[0] == list(range(50))
    assert 1 <= result.json[1] <= 3


def test_threads_share_the_leases_of_their_process(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(three)
def f(x): return x + 1
found = {}
def work(start):
    for n in range(start, start + 50): found[n] = f(n).result()
threads = [threading.Thread(target=work, args=(100 * n,)) for n in range(8)]
for t in threads: t.start()
for t in threads: t.join()
print(json.dumps([len(found), all(value == n + 1 for n, value in found.items()), len(leases()) <= 3]))
"""
    )
    assert result.json == [400, True, True]


def test_a_loop_and_threads_take_turns_on_few_leases(shared_daemon: Host) -> None:
    """Each reads its own answers, and a task that ends does not stop the loop from listening for another one's."""
    result = shared_daemon.run(
        HEAD
        + """
@remote(three)
def f(x): return x
f(0).result()
found = []
def work(start):
    for n in range(start, start + 500): found.append(f(n).result(10) == n if n % 7 == 0 else f(n).result() == n)
async def each(start):
    for n in range(start, start + 500): found.append(await f(n) == n)
async def main(): await asyncio.gather(*(each(1000 * n) for n in range(4)))
threads = [threading.Thread(target=work, args=(1000 * n,)) for n in (1, 2)]
for t in threads: t.start()
asyncio.run(main())
for t in threads: t.join()
print(json.dumps([len(found), all(found)]))
""",
        timeout=60,
    )
    assert result.json == [3000, True]


def test_calls_that_nobody_waits_for_run_all_the_same(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(one)
def f(x): return x
handles = [f(n) for n in range(20)]
deadline = time.monotonic() + 20
while not all(h.done() for h in handles) and time.monotonic() < deadline: time.sleep(0.01)
seen = []
f(99).add_done_callback(lambda h: seen.append(h.result()))
while not seen and time.monotonic() < deadline: time.sleep(0.01)
print(json.dumps([[h.result() for h in handles], seen]))
"""
    )
    assert result.json == [list(range(20)), [99]]


def test_an_idle_lease_makes_room_for_another_process(shared_daemon: Host) -> None:
    holder = shared_daemon.popen(HEAD + "@remote(one)\ndef f(x): return x\nf(1).result()\nopen('held', 'w').close()\nwhile not os.path.exists('go'): time.sleep(0.01)\nprint(f(2).result())")
    wait_until(lambda: (shared_daemon.project / "held").exists(), 30)
    result = shared_daemon.run(HEAD + "@remote(one)\ndef f(x): return x\nbegan = time.monotonic()\nf(1).result()\nprint(json.dumps(time.monotonic() - began))")
    assert result.json < 5
    (shared_daemon.project / "go").touch()
    out, _ = holder.communicate(timeout=30)
    assert out == "2\n"


def test_who_never_pauses_is_interrupted_between_two_calls_when_others_wait(shared_daemon: Host) -> None:
    busy = shared_daemon.popen(
        HEAD
        + """
@remote(one)
def f(x): return x
end = time.monotonic() + 12
count = 0
print("going", flush=True)
while time.monotonic() < end:
    assert f(count).result() == count
    count += 1
print(count)
"""
    )
    assert busy.stdout is not None
    assert busy.stdout.readline() == "going\n"
    result = shared_daemon.run(HEAD + "@remote(one)\ndef f(x): return x\nprint(json.dumps([f(n).result() for n in range(3)]))", timeout=30)
    assert result.json == [0, 1, 2]
    assert busy.poll() is None, "it waited for the end of the other"
    out, err = busy.communicate(timeout=30)
    assert busy.returncode == 0, err
    assert int(out) > 100


def test_two_functions_of_one_pool_share_a_lease(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(one)
def f(x): return "f", x
@remote(one, timeout=9)
def g(x): return "g", x
found = [call(n).result() for n in range(20) for call in (f, g)]
print(json.dumps([len(found), len({id(l) for l in leases()})]))
"""
    )
    assert result.json == [40, 1]


def test_streams_and_instances_get_the_worker_that_an_idle_lease_holds(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(one)
def f(x): return x
@remote(one)
def numbers(n): yield from range(n)
@remote(one)
class Counter:
    def __init__(self): self.n = 0
    def up(self):
        self.n += 1
        return self.n
counter = Counter()
print(json.dumps([f(1).result(), list(numbers(3)), f(2).result(), counter.up().result(), f(3).result(), counter.up().result()]))
"""
    )
    assert result.json == [1, [0, 1, 2], 2, 1, 3, 2]


def test_the_death_of_a_worker_is_named_and_the_next_call_works(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(one)
def f(how):
    if how: os.kill(os.getpid(), how)
    return os.getpid()
first = f(0).result()
try: f(signal.SIGSEGV).result()
except WorkerLost as error: print(json.dumps([str(error), f(0).result() != first]))
"""
    )
    assert "SIGSEGV" in result.json[0]
    assert result.json[1] is True


def test_a_worker_killed_between_two_calls_costs_nothing(shared_daemon: Host) -> None:
    """Nothing of the second call was accepted, so it is sent elsewhere."""
    result = shared_daemon.run(
        HEAD
        + """
@remote(one)
def pid(): return os.getpid()
first = pid().result()
os.kill(first, signal.SIGKILL)
while os.path.exists(f"/proc/{first}"): time.sleep(0.01)
print(json.dumps(pid().result() != first))
"""
    )
    assert result.json is True


def test_f24_a_leased_call_times_out_with_everything_it_started(shared_daemon: Host) -> None:
    mark = shared_daemon.project / "sleeper"
    result = shared_daemon.run(
        HEAD
        + f"""
import subprocess
@remote(one, timeout=1)
def f():
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    open({str(mark)!r}, "w").write(str(child.pid))
    time.sleep(600)
try: f().result()
except Exception as error: print(json.dumps([type(error).__name__, str(error)]))
"""
    )
    name, text = result.json
    assert name == "JobTimedOut", text
    assert "1 s" in text
    pid = int(mark.read_text())
    wait_until(lambda: not _is_alive(pid), 10)


def test_f25_one_call_of_many_is_cancelled(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(one)
def f(x):
    time.sleep(x)
    return x
running, queued, last = f(600), f(601), f(0)
time.sleep(1)
print(json.dumps([queued.cancel(), running.cancel(), last.result()]))
out = []
for h in (running, queued):
    try: h.result()
    except Exception as error: out.append(type(error).__name__)
print(json.dumps(out))
"""
    )
    lines = [json.loads(line) for line in result.out.splitlines()]
    assert lines == [[True, True, 0], ["JobCancelled", "JobCancelled"]]


def test_f25_cancelling_the_task_cancels_the_call(shared_daemon: Host) -> None:
    mark = shared_daemon.project / "cancelled-task"
    result = shared_daemon.run(
        HEAD
        + f"""
@remote(one)
async def f():
    open({str(mark)!r}, "w").close()
    try: await asyncio.sleep(600)
    finally: open({str(mark)!r}, "w").write("ended")
@remote(one)
def g(): return "next"
async def main():
    task = asyncio.ensure_future(f())
    while not os.path.exists({str(mark)!r}): await asyncio.sleep(0.01)
    task.cancel()
    try: await task
    except asyncio.CancelledError: pass
    return await g()
print(json.dumps(asyncio.run(main())))
"""
    )
    assert result.json == "next"
    assert mark.read_text() == "ended"


def test_the_client_may_die_and_the_worker_is_free(shared_daemon: Host) -> None:
    process = shared_daemon.popen(HEAD + "@remote(one)\ndef f(x):\n    time.sleep(x)\nf(0).result()\nprint('idle', flush=True)\nf(600).result()")
    assert process.stdout is not None
    assert process.stdout.readline() == "idle\n"
    time.sleep(0.2)  # nothing tells from outside that the second call has begun
    process.send_signal(signal.SIGKILL)
    process.communicate()
    result = shared_daemon.run(HEAD + "@remote(one)\ndef f(x):\n    return x\nprint(f(7).result())")
    assert result.out.strip() == "7"


def test_a_forked_child_has_leases_of_its_own(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(three)
def f(x): return x
assert f(1).result() == 1
pid = os.fork()
if not pid:
    assert f(2).result() == 2
    os._exit(0)
found = [f(n).result() for n in range(20)]
_, status = os.waitpid(pid, 0)
print(json.dumps([found, status, f(3).result()]))
"""
    )
    assert result.json == [list(range(20)), 0, 3]


def test_output_is_shown_before_the_result_and_live(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(one)
def f(n):
    print("in", n)
    return n
for n in range(5): print("out", f(n).result())
@remote(one)
def slow():
    print("early")
    time.sleep(30)
h = slow()
began = time.monotonic()
while not h.logs() and time.monotonic() < began + 20: time.sleep(0.01)
print(h.logs().strip() == "early")
h.cancel()
"""
    )
    assert result.out.splitlines() == [line for n in range(5) for line in (f"in {n}", f"out {n}")] + ["early", "True"]


def test_what_a_child_process_prints_arrives_too(shared_daemon: Host) -> None:
    result = shared_daemon.run(HEAD + "@remote(one)\ndef f():\n    return os.system('echo from the shell')\nprint(f().result())")
    assert result.out.splitlines() == ["from the shell", "0"]


def test_a_body_that_closes_its_streams_harms_only_itself(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(one)
def close():
    for fd in (0, 1, 2): os.close(fd)
    return os.getpid()
@remote(one)
def say(): print("still here"); return os.getpid()
print(close().result() == say().result())
"""
    )
    assert result.out.splitlines() == ["still here", "True"]


def test_a_daemon_that_dies_leaves_the_call_in_hand_alone(daemon: Host) -> None:
    process = daemon.popen(
        HEAD
        + """
@remote(one)
def f(x):
    time.sleep(x)
    return x
f(0).result()
h = f(2)
print("sent", flush=True)
print(h.result(), f(1).result())
"""
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "sent\n"
    time.sleep(0.5)
    daemon.kill()
    daemon.start()
    out, err = process.communicate(timeout=60)
    assert out.strip() == "2 1", err


def test_async_bodies_overlap_in_one_worker(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
wide = CpuLiveLoadBalancer(name="wide", workersMax=1, max_concurrency=10)
together = 0
@remote(wide)
async def f(x):
    global together
    together += 1
    most = together
    while together < 5 and most < 5:
        await asyncio.sleep(0.01)
        most = max(most, together)
    await asyncio.sleep(0.05)
    print("call", x)
    return x, os.getpid()
async def main(): return await asyncio.gather(*(f(n) for n in range(5)))
found = asyncio.run(main())
print(json.dumps([[x for x, _ in found], len({pid for _, pid in found})]))
"""
    )
    assert json.loads(result.out.splitlines()[-1]) == [list(range(5)), 1]
    assert sorted(result.out.splitlines()[:-1]) == [f"call {n}" for n in range(5)]


def test_calls_in_ever_new_surroundings_leave_nothing_behind(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
from remoted_client import submission
submission._POOLS_MOST = 3
@remote(one)
def f(): return os.environ["N"]
found = []
for n in range(8):
    os.environ["N"] = str(n)
    found.append(f().result())
    while leases(): time.sleep(0.01)
print(json.dumps([found, len(current().pools)]))
"""
    )
    assert result.json[0] == [str(n) for n in range(8)]
    assert result.json[1] <= 3


def test_nothing_is_left_after_many_calls(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(one)
def count(): return len(os.listdir("/proc/self/fd")), threading.active_count()
@remote(one)
def f(data): return data
def mine(): return len(os.listdir("/proc/self/fd")), threading.active_count()
big = bytes(200_000)
for n in range(100): assert len(f(big).result()) == 200_000
before = count().result(), mine()
for n in range(1000): assert f(n).result() == n
for n in range(100): assert len(f(big).result()) == 200_000
print(json.dumps([before, [count().result(), mine()]]))
"""
    )
    before, after = result.json
    assert before == after


def test_t34_a_client_that_breaks_the_protocol_loses_its_lease_and_nobody_else_anything(shared_daemon: Host) -> None:
    head = """
import os, time
from remoted_client import remote, wire, CpuLiveLoadBalancer
from remoted_client.connection import current
@remote(CpuLiveLoadBalancer(name="garbage", workersMax=1))
def pid(): return os.getpid()
print(pid().result())
"""
    hostile = """
(pool,) = current().pools.values()
(lease,) = pool._leases
lease._sock.sendall(wire.encode({garbage}))
while lease._sock is not None: time.sleep(0.01)
"""
    first = shared_daemon.run(head).out
    for garbage in ({"op": "use"}, {"op": "put"}, {"n": 1, "use": 7}, {"n": [], "use": {}}, {"op": "use", "use": 0, "code": 5}, {"op": "use", "use": 0, "client": "c", "instance": {"id": 5}}):
        shared_daemon.run(head + hostile.replace("{garbage}", repr(garbage)))
    assert shared_daemon.run(head).out == first, "the same worker"


def _is_alive(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as file:
            return file.read().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False
