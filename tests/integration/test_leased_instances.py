"""Methods of remote instances on leases: the call goes to the worker in which the instance lives (MECHANISMS 3 and 14)."""

from __future__ import annotations

import json

from tests.faults.rawclient import raw
from tests.harness import Host, host, wait_until
from tests.integration.test_leases import HEAD as LEASES

HEAD = (
    LEASES
    + """
def said(path): return open(path).read().split() if os.path.exists(path) else []
def say(path, *words):
    with open(path, "a") as file: file.write(" ".join(map(str, words)) + "\\n")
class Counter:
    def __init__(self, log="", name=""):
        self.n, self.log, self.name, self.busy = 0, log, name, 0
        if log: say(log, "made" + name)
    def up(self, by=1):
        self.n += by
        return self.n
    async def aup(self): return self.up()
    def numbers(self, k):
        for i in range(k): yield self.up()
    def pid(self): return os.getpid()
    def die(self): os.kill(os.getpid(), signal.SIGKILL)
    def sleep(self): time.sleep(600)
    def close(self):
        if self.log: say(self.log, "closed" + self.name)
One, Three = remote(one)(Counter), remote(three)(Counter)
"""
)


def test_f20_a_warm_method_passes_by_the_daemon(shared_daemon: Host) -> None:
    """The daemon is stopped, and the calls go on: two instances and a function, on one lease of one worker."""
    result = shared_daemon.run(
        HEAD
        + """
@remote(one)
def double(x): return 2 * x
a, b = One(), One()
found = [a.up().result(), b.up(5).result(), double(1).result()]
daemon = current().daemon["pid"]
os.kill(daemon, signal.SIGSTOP)
try: found += [call().result(5) for _ in range(50) for call in (a.up, lambda: b.up(by=5), lambda: double(2))]
finally: os.kill(daemon, signal.SIGCONT)
print(json.dumps([found[:3], found[-3:], len(leases())]))
"""
    )
    assert result.json == [[1, 5, 2], [51, 255, 4], 1]


def test_f20_threads_on_one_instance_find_one_object_and_its_methods_one_at_a_time(shared_daemon: Host) -> None:
    log = shared_daemon.project / "threads.log"
    result = shared_daemon.run(
        HEAD
        + f"""
@remote(three)
class Slow(Counter):
    def up(self):
        self.busy += 1
        time.sleep(0.002)
        self.busy -= 1
        return super().up(), self.busy
slow = Slow({str(log)!r})
found = []
def work():
    for _ in range(20): found.append(slow.up().result())
threads = [threading.Thread(target=work) for _ in range(5)]
[t.start() for t in threads]; [t.join() for t in threads]
print(json.dumps([sorted(found), said({str(log)!r})]))
"""
    )
    assert result.json == [[[n, 0] for n in range(1, 101)], ["made"]]


def test_f20_a_new_instance_lives_in_a_worker_that_is_at_hand_and_many_at_once_in_several(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(three)
class Where:
    async def pid(self):
        await asyncio.sleep(0.3)
        return os.getpid()
one_by_one = [Where().pid().result() for _ in range(4)]
together = [Where() for _ in range(3)]
async def main(): return await asyncio.gather(*(each.pid() for each in together))
first, again = asyncio.run(main()), asyncio.run(main())
print(json.dumps([len(set(one_by_one)), len(set(first)), first == again]))
"""
    )
    assert result.json == [1, 3, True]


def test_f20_an_instance_is_constructed_again_when_its_worker_is_lost_and_the_handle_says_so(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
c = One()
found = []
def call(handle):
    try: value = handle.result()
    except WorkerLost as error: value = type(error).__name__
    found.append([value, handle.reconstructed()])
call(c.up()); call(c.up()); call(c.die()); call(c.up()); call(c.up())
pid = c.pid().result()
os.kill(pid, signal.SIGKILL)
while os.path.exists(f"/proc/{pid}"): time.sleep(0.01)
call(c.up()); call(c.up())
print(json.dumps(found))
"""
    )
    assert result.json == [[1, False], [2, False], ["WorkerLost", False], [1, True], [2, False], [1, True], [2, False]]


def test_f20_what_is_not_referred_to_any_more_is_gone_before_the_next_is_constructed(shared_daemon: Host) -> None:
    """On one lease that is never idle: two models need not find room in one worker."""
    log = str(shared_daemon.project / "calls.log")
    result = shared_daemon.run(
        HEAD
        + f"""
@remote(one)
def nothing(): pass
for n in range(20):
    nothing().result()
    assert One({log!r}, str(n)).up().result() == 1  # its handle is gone before the call runs
    counter = One({log!r}, "b" + str(n))
    assert [counter.up().result() for _ in range(2)] == [1, 2]
    nothing().result()
    del counter
print(json.dumps(said({log!r})))
"""
    )
    names = [name for n in range(20) for name in (f"{n}", f"b{n}")]
    wait_until(lambda: len((shared_daemon.project / "calls.log").read_text().split()) == 80, 10)
    assert (shared_daemon.project / "calls.log").read_text().split() == [word for name in names for word in (f"made{name}", f"closed{name}")]
    assert result.json == (shared_daemon.project / "calls.log").read_text().split()[: len(result.json)]


def test_f20_close_comes_behind_the_calls_that_were_made_before(shared_daemon: Host) -> None:
    log = str(shared_daemon.project / "close.log")
    result = shared_daemon.run(
        HEAD
        + f"""
@remote(one)
class Slow(Counter):
    def up(self):
        time.sleep(0.02)
        return super().up()
slow = Slow({log!r})
handles = [slow.up() for _ in range(5)]
slow.close()
found = [handle.result() for handle in handles]
found += [slow.up().result(), slow.up().result()]
named = Slow.options(name="n")({log!r}, "n")
for _ in range(10):
    assert [named.up().result(), named.up().result()] == [1, 2]
    named.close()
print(json.dumps([found, said({log!r})[:3]]))
"""
    )
    assert result.json == [[1, 2, 3, 4, 5, 1, 2], ["made", "closed", "made"]]


def test_f20_an_instance_with_a_name_is_one_for_several_processes(shared_daemon: Host) -> None:
    """Each asks for the worker in which it lives, and has to wait until the other one has had its turn."""
    script = (
        HEAD
        + """
shared = Three.options(name="shared")()
@remote(three)
def other(): return os.getpid()
if sys.argv[1] == "elsewhere": other().result()
values = [shared.up().result() for _ in range(int(sys.argv[2]))]
print(json.dumps([values[0], values[-1]]))
"""
    )
    assert shared_daemon.run(script, "here", "3").json == [1, 3]
    assert shared_daemon.run(script, "elsewhere", "2").json == [4, 5]
    several = [shared_daemon.popen(script, "here", "100") for _ in range(3)]
    said = [(*process.communicate(timeout=60), process.returncode) for process in several]
    assert [code for _, _, code in said] == [0, 0, 0], said
    assert max(json.loads(out)[1] for out, _, _ in said) == 305


def test_f20_generators_coroutines_arrays_and_output_of_methods(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(one)
class Many(Counter):
    async def anumbers(self, k):
        for i in range(k): yield self.up()
    def echo(self, data):
        print("echo", self.up())
        return data
many = Many()
async def main(): return [await many.aup(), [item async for item in many.anumbers(3)], await many.aup()]
found = [list(many.numbers(100))[-1], *asyncio.run(main())]
for item in many.numbers(10_000):
    if item > 105: break
data = bytearray(b"x" * 300_000)
found.append(many.echo(data).result() == data)
print(json.dumps(found))
"""
    )
    assert result.json == [100, 101, [102, 103, 104], 105, True]
    assert "echo" in result.out


def test_f25_a_method_is_cancelled_or_times_out_and_its_instance_lives_on(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
c = One()
found = [c.up().result()]
for stop in ("cancel", "timeout"):
    handle = c.sleep() if stop == "cancel" else c.sleep.options(timeout=0.3)()
    if stop == "cancel":
        while str(handle.status()) != "IN_PROGRESS": time.sleep(0.01)
        handle.cancel()
    try: handle.result()
    except BaseException as error: found.append(type(error).__name__)
    found.append(c.up().result())
print(json.dumps(found))
"""
    )
    assert result.json == [1, "JobCancelled", 2, "JobTimedOut", 3]


def test_f25_a_method_that_waits_is_cancelled_where_it_waits(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
c = One()
c.up().result()
first, second, third = c.sleep(), c.up(), c.up()
second.cancel()
try: second.result()
except BaseException as error: found = [type(error).__name__]
first.cancel()
print(json.dumps([*found, third.result()]))
"""
    )
    assert result.json == ["JobCancelled", 2]


def test_f30_methods_of_one_instance_overlap_where_the_config_says_so(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(CpuLiveLoadBalancer(name="five", workersMax=2, max_concurrency=5))
class Meeting:
    def __init__(self): self.here, self.all_here = 0, asyncio.Event()
    async def come(self):
        self.here += 1
        if self.here == 5: self.all_here.set()
        await self.all_here.wait()
        return os.getpid()
meeting = Meeting()
async def main(): return await asyncio.gather(*(meeting.come() for _ in range(5)))
print(json.dumps(len(set(asyncio.run(main())))))
"""
    )
    assert result.json == 1


def test_an_idle_lease_of_an_instance_makes_room_for_another_process_and_its_state_stays(shared_daemon: Host) -> None:
    script = (
        HEAD
        + """
c = One()
print(c.up().result(), flush=True)
while not os.path.exists('go-on'): time.sleep(0.01)
print(json.dumps(c.up().result()))
"""
    )
    first = shared_daemon.popen(script)
    assert first.stdout is not None
    assert first.stdout.readline() == "1\n"
    assert shared_daemon.run(HEAD + "print(json.dumps([One().up().result(), remote(one)(os.getpid)().result() > 0]))").json == [1, True]
    (shared_daemon.project / "go-on").touch()
    assert json.loads(first.communicate(timeout=30)[0]) == 2


def test_calls_by_the_daemon_and_on_leases_find_the_same_object(shared_daemon: Host) -> None:
    """An option that concerns the daemon, and a body that calls."""
    result = shared_daemon.run(
        HEAD
        + """
c = One.options(name="both")()
@remote(three)
def inside(): return One.options(name="both")().up().result()
print(json.dumps([c.up().result(), c.up.options(priority=5)().result(), c.up().result(), inside().result(), c.up().result()]))
"""
    )
    assert result.json == [1, 2, 3, 4, 5]


def test_a_forked_child_finds_the_same_object(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
c = One()
found = [c.up().result()]
read, write = os.pipe()
if os.fork() == 0:
    os.write(write, str(c.up().result()).encode())
    os._exit(0)
found += [int(os.read(read, 10)), c.up().result()]
print(json.dumps(found))
"""
    )
    assert result.json == [1, 2, 3]


def test_very_many_instances_leave_nothing_behind(shared_daemon: Host) -> None:
    """More methods than a lease has numbers for; the worker's memory of objects is empty afterwards."""
    result = shared_daemon.run(
        HEAD
        + """
import gc
@remote(one)
class Small:
    def __init__(self, n): self.n = n
    def get(self): return self.n
    @staticmethod
    def alive(): return sum(type(found).__name__ == "Small" for found in gc.get_objects())
keep = Small(0)
found = [Small(n).get().result() for n in range(2100)]
last = Small(0)
print(json.dumps([found == list(range(2100)), last.alive().result(), keep.get().result(), max(len(lease._uses) for lease in leases()) <= 1000]))
"""
    )
    assert result.json == [True, 1, 0, True], "the one that is asked is the only one"


def test_f20_a_method_goes_on_when_the_daemon_dies_and_the_next_one_constructs_again(daemon: Host) -> None:
    """``kill -9``, and nobody keeps its workers: what is in hand goes on, then the worker ends."""
    process = daemon.popen(
        HEAD
        + """
c = One()
c.up().result()
@remote(one)
class Slow(Counter):
    def up(self):
        open("begun", "w").close()
        while not os.path.exists("go-on"): time.sleep(0.01)
        return super().up()
handle = Slow().up()
first = handle.result()
again = c.up()
print(json.dumps([first, again.result(), again.reconstructed()]))
"""
    )
    wait_until((daemon.project / "begun").exists, 30)
    daemon.kill()
    daemon.start()
    (daemon.project / "go-on").touch()
    out, err = process.communicate(timeout=60)
    assert json.loads(out) == [1, 1, True], err


def test_t10_an_instance_is_settled_on_nobody_elses_lease(shared_daemon: Host) -> None:
    """A lease that is not one's own is as one that does not exist: the answer is no worker."""
    holder = shared_daemon.popen(HEAD + "c = One()\nc.up().result()\nprint(leases()[0].id, flush=True)\nwhile not os.path.exists('seen'): c.up().result()\n")
    assert holder.stdout is not None
    mine = holder.stdout.readline().strip()
    with raw(shared_daemon) as client:
        for lease in ("0" * 32, "../../etc", ""):
            client.send({"op": "settle", "lease": lease, "instance": "1" * 32})
            found = client.until("settled").header
            assert (found["worker"], found["drops"]) == ("", 0), lease
        client.send({"op": "settle", "lease": mine, "instance": "1" * 32})
        assert client.until("settled").header["worker"], "of the same user it is known, whichever connection asks"
    (shared_daemon.project / "seen").touch()
    assert holder.communicate(timeout=30) == ("", "")


def test_t18_a_user_has_so_many_objects_and_no_more() -> None:
    """On leases and through the daemon; one that is dropped makes room, and what lives goes on."""
    with host("[limits]\ninstances_per_uid = 3\n") as small:
        result = small.start().run(
            HEAD
            + """
from remoted_client import errors
def value(call):
    found = call.result(10)
    return found.unwrap() if hasattr(found, "unwrap") else found
def refusal(call):
    try: return value(call())
    except errors.RemotedError as error: return error.code, "instances_per_uid is 3" in str(error)
Queued = remote(CpuLiveServerless(name="queued", workersMax=1))(Counter)
kept = [One(), Three(), Queued()]
first = [value(instance.up()) for instance in kept]
refused = [refusal(lambda: cls().up()) for cls in (One, Three, Queued)]
again = [value(instance.up()) for instance in kept]
kept.pop(0).close()
print(json.dumps([first, refused, again, refusal(lambda: One().up())]))
"""
        )
    assert result.json == [[1, 1, 1], [["OVER_LIMIT", True]] * 3, [2, 2, 2], 1]
