"""SURFACE rows F20 to F30: classes, generators, output, local, retries and time, cancelling, jobs by id, nesting."""

from __future__ import annotations

import os
import signal
import sys

import pytest

from tests.harness import Host, wait_until
from tests.surface.test_f01_to_f06_calls import HEAD


def test_f20_an_instance_keeps_its_state_and_is_constructed_again_when_its_worker_is_lost(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
import os, signal
@remote(queue, max_retries=1)
class Counter:
    def __init__(self, start, *, step=1): self.n, self.step = start, step
    def inc(self): self.n += self.step; return self.n
    async def ainc(self): self.n += self.step; return self.n
    def die_once(self):
        if self.n > 10: os.kill(os.getpid(), signal.SIGKILL)
        return self.n
    def items(self, k):
        for i in range(k): yield i + self.n
c, d = Counter(10, step=2), Counter(0)
found = [c.inc().result().output, c.inc().result().output, asyncio.run(c.ainc()).output, d.inc().result().output, list(c.items(2))]
out = c.die_once().result()
found += [out.output, out.reconstructed, c.inc().result().reconstructed, d.inc().result().output]
errors = []
for attempt in (lambda: c.nothing(), lambda: c._private(), lambda: c.inc(5), lambda: Counter()):
    try: attempt()
    except (AttributeError, TypeError) as error: errors.append(type(error).__name__)
print(json.dumps([found, errors]))
"""
    )
    found, errors = result.json
    assert found[:5] == [12, 14, 16, 1, [16, 17]]
    assert found[5:7] == [10, True], "constructed again in another worker, and said so"
    assert errors == ["AttributeError", "AttributeError", "TypeError", "TypeError"]


def test_f20_methods_have_the_options_and_the_map_of_functions(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(queue, max_retries=0)
class Adder:
    def __init__(self, start): self.total = start
    def add(self, n, m=0): self.total += n + m; return self.total
    def sleep(self): time.sleep(30)
adder = Adder(10)
found = [[out.output for out in adder.add.map(range(4))], [out.output for out in adder.add.starmap([(1, 2), (3, 4)])]]
found.append([str(adder.sleep.options(timeout=0.2)().result().status), str(Adder.options(timeout=0.2)(0).sleep().result().status)])
found.append([out.unwrap() for out in Adder.local(1).add.map([1, 1])])
def error(attempt):
    try: attempt()
    except (TypeError, ValueError) as problem: return str(problem)
found.append([error(lambda: adder.add.options(timeuot=1)), error(lambda: adder.add.map([1], progres=True)), error(lambda: Adder.options(priority=1000)), repr(adder.add)])
print(json.dumps(found))
"""
    )
    mapped, starmapped, statuses, local, errors = result.json
    assert mapped == [10, 11, 13, 16]
    assert starmapped == [19, 26]
    assert statuses == ["TIMED_OUT", "TIMED_OUT"]
    assert local == [2, 3]
    assert "did you mean" in errors[0]
    assert "did you mean" in errors[1]
    assert "priority" in errors[2]
    assert errors[3].startswith("<remote method Adder.add of <remote instance ")


def test_f20_an_instance_with_a_name_is_found_by_the_same_users_next_process(shared_daemon: Host) -> None:
    script = (
        HEAD
        + """
@remote(queue)
class Named:
    def __init__(self, start, *, table): self.n = start
    def inc(self): self.n += 1; return self.n
mine = Named.options(name="mine")
one = mine(5, table={"a": [1, 2.5]})
outs = [one.inc().result(), mine(5, table={"a": [1, 2.5]}).inc().result()]
others = [mine(6, table={}).inc().result(), Named.options(name="other")(5, table={"a": [1, 2.5]}).inc().result(), Named(5, table={"a": [1, 2.5]}).inc().result()]
if len(sys.argv) > 1: one.close()
print(json.dumps([[out.output for out in outs + others], [out.reconstructed for out in outs]]))
"""
    )
    first, second, third = (shared_daemon.run(script, *more).json for more in ((), ("close",), ()))
    assert first == [[6, 7, 7, 6, 6], [False, False]]
    assert second == [[8, 9, 8, 7, 6], [False, False]], "the same instances, from another process"
    assert third[0] == [6, 7, 9, 8, 6], "the one that was closed is made anew, the others live on"


def test_f21_generators_stream_with_back_pressure_and_stop_when_left(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
import os, tempfile
trace = tempfile.mktemp()
def note(text):
    with open(trace, "a") as file: file.write(text + "\\n")
@remote(queue)
def numbers(n, path):
    produced = 0
    try:
        for i in range(n):
            produced += 1
            yield i
    finally:
        with open(path, "a") as file: file.write(f"{produced}\\n")
@remote(direct)
async def slow_numbers(n):
    for i in range(n): yield {"i": i}
@remote(queue, max_retries=3)
def breaks(n):
    yield from range(n)
    raise ValueError("after items")
async def main():
    return [x["i"] async for x in slow_numbers(200)]
whole = list(numbers(300, trace))
early = []
for x in numbers(10**9, trace):
    early.append(x)
    if x == 99: break
out = numbers(5, trace).result()
kept = Job.from_id(out.id).result().output
seen = []
try:
    for x in breaks(3): seen.append(x)
except ValueError as error: seen.append(str(error))
deadline = time.time() + 10
while len(open(trace).read().split()) < 3 and time.time() < deadline: time.sleep(0.01)
produced = sorted(map(int, open(trace).read().split()))
failed = breaks(3).result()
print(json.dumps([whole == list(range(300)), early == list(range(100)), produced[-1] < 400, out.output, kept, asyncio.run(main()) == list(range(200)), seen, failed.attempts, failed.error]))
"""
    )
    found = result.json
    assert found[:3] == [True, True, True]
    assert found[3] == found[4] == [0, 1, 2, 3, 4]
    assert found[5] is True
    assert found[6] == [0, 1, 2, "after items"]
    assert found[7] == 1, "a stream is not tried again once items were delivered"
    assert "3 items" in found[8]


def test_f22_output_is_live_apart_and_keeps_its_carriage_returns(shared_daemon: Host) -> None:
    process = shared_daemon.popen(
        HEAD
        + """
import logging
@remote(queue)
def work(gate):
    import os
    sys.stdout.write("10%\\r20%\\r"); sys.stdout.flush()
    print("error line", file=sys.stderr)
    logging.warning("logged")
    os.write(1, "raw \\u00e9\\n".encode())
    while not os.path.exists(gate): time.sleep(0.01)
    print("end")
out = work(sys.argv[1]).result()
assert out.stdout == "10%\\r20%\\rraw \\u00e9\\nend\\n", out.stdout
""",
        str(shared_daemon.project / "gate"),
    )
    assert process.stdout is not None
    assert process.stderr is not None
    assert os.read(process.stdout.fileno(), 8) == b"10%\r20%\r", "shown before the function ended"
    (shared_daemon.project / "gate").touch()
    out, err = process.communicate(timeout=30)
    assert process.returncode == 0, err
    assert out == "raw é\nend\n"
    assert "error line\n" in err
    assert "logged" in err


def test_f23_local_runs_here_with_the_same_types_and_without_a_daemon(bare_host: Host) -> None:
    script = bare_host.write(
        "local.py",
        HEAD
        + """
import os
LOCAL = os.environ.get("LOCAL_TEST") == "True"
@remote(queue, local=LOCAL)
async def f(x):
    if x < 0: raise ValueError("negative")
    return [x, os.getpid()]
@remote(direct, local=LOCAL)
def g(x): return x + 1
@remote(queue, local=LOCAL)
def h(n): yield from range(n)
good, bad = asyncio.run(f(1)), f(-1).result()
assert isinstance(good, JobOutput) and good.output == [1, os.getpid()] and bad.status == "FAILED" and "negative" in bad.error
assert g(1).result() == 2 and asyncio.run(g(2)) == 3 and list(h(3)) == [0, 1, 2] and h(2).result().output == [0, 1]
assert f.local(5).result().output[0] == 5 and [o.output for o in f.map([1])][0][0] == 1
print("ok")
""",
    )
    assert bare_host.run(script, LOCAL_TEST="True").out == "ok\n"
    assert bare_host.run(script, REMOTED_LOCAL="1").out == "ok\n"
    assert not bare_host.sockets.exists()


def test_f24_by_default_an_ordinary_exception_is_tried_once_more(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(queue)
def f(path):
    with open(path, "a") as file: file.write("x")
    raise ValueError("an ordinary one")
out = f(sys.argv[1]).result()
print(json.dumps([str(out.status), open(sys.argv[1]).read()]))
""",
        str(shared_daemon.project / "f24-default"),
    )
    assert result.json == ["FAILED", "xx"]


def test_f24_retries_with_back_off_and_a_timeout_that_really_stops(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
import os
@remote(queue, max_retries=2)
def flaky(path, good_at):
    with open(path, "a") as file: file.write("x")
    if len(open(path).read()) < good_at: raise RuntimeError("not yet")
    return "done"
@remote(queue, max_retries=3, timeout=0.3)
def slow(path):
    with open(path, "a") as file: file.write("x")
    while True:
        time.sleep(0.01)
        with open(path + ".alive", "w") as file: file.write(str(time.time()))
base = sys.argv[1]
passed, failed = flaky(base + "a", 3).result(), flaky(base + "b", 9).result()
timed = slow(base + "c").result()
stopped = os.stat(base + "c.alive").st_mtime
time.sleep(0.2)
print(json.dumps([passed.output, passed.attempts, str(failed.status), failed.attempts, len(open(base + "b").read()),
    str(timed.status), timed.attempts, os.stat(base + "c.alive").st_mtime == stopped, str(timed.exception)]))
""",
        str(shared_daemon.project / "f24"),
    )
    assert result.json[:8] == ["done", 3, "FAILED", 3, 3, "TIMED_OUT", 1, True]


def test_f25_cancel_stops_the_body_and_the_processes_that_it_started(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
import os, subprocess
@remote(queue, max_retries=0)
def family(path):
    child = subprocess.Popen(["sleep", "600"], start_new_session=True)
    with open(path + ".new", "w") as file: file.write(str(child.pid))
    os.rename(path + ".new", path)
    time.sleep(600)
@remote(queue, max_retries=0)
async def awaiting(path):
    open(path, "w").close()
    await asyncio.sleep(600)
@remote(queue)
def after(): return "alive"
def until(path):
    while not os.path.exists(path): time.sleep(0.01)
base = sys.argv[1]
h = family(base + "family"); until(base + "family"); pid = int(open(base + "family").read())
h.cancel(); first = h.result()
try: gone = open(f"/proc/{pid}/stat").read().split()[2] == "Z"
except FileNotFoundError: gone = True
a = awaiting(base + "await"); until(base + "await"); a.cancel(); second = a.result()
try: first.unwrap()
except JobCancelled: raised = True
print(json.dumps([str(first.status), gone, str(second.status), raised, after().result().output]))
""",
        str(shared_daemon.project / "f25"),
    )
    assert result.json == ["CANCELLED", True, "CANCELLED", True, "alive"]


def test_f25_ctrl_c_in_the_script_cancels_its_blocking_call(shared_daemon: Host) -> None:
    process = shared_daemon.popen(
        HEAD
        + """
@remote(queue)
def forever(path):
    open(path, "w").close()
    try: time.sleep(600)
    finally: open(path + ".stopped", "w").close()
forever(sys.argv[1]).result()
""",
        str(shared_daemon.project / "ctrlc"),
    )
    wait_until((shared_daemon.project / "ctrlc").exists, 20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    (line,) = err.splitlines()
    assert line.startswith(f"remoted: interrupted at {shared_daemon.project / 'script.py'}:")
    assert line.endswith(", while it waited; the calls of this script are cancelled, but for detached ones")
    wait_until((shared_daemon.project / "ctrlc.stopped").exists, 20)


@pytest.mark.parametrize("how", ["submitted", "found", "awaited"])
def test_f25_ctrl_c_ends_no_detached_job_nor_one_that_was_only_looked_at(shared_daemon: Host, how: str) -> None:
    begun, go_on = shared_daemon.project / f"detached-{how}", shared_daemon.project / f"go-on-{how}"
    script = (
        HEAD
        + """
import asyncio, os
@remote(queue)
def lasting(begun, go_on):
    open(begun, "w").close()
    while not os.path.exists(go_on): time.sleep(0.01)
    return "over"
job = lasting.options(detach=True)(*sys.argv[2:])
print(job.id, flush=True)
if sys.argv[1] == "found": job = Job.from_id(job.id)
if sys.argv[1] == "awaited":
    async def main(): await job
    asyncio.run(main())
job.result()
"""
    )
    process = shared_daemon.popen(script, how, str(begun), str(go_on))
    assert process.stdout is not None
    job = process.stdout.readline().strip()
    wait_until(begun.exists, 20)
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    go_on.touch()
    found = shared_daemon.run(HEAD + "print(json.dumps(Job.from_id(sys.argv[1]).result(60).unwrap()))", job)
    assert found.json == "over"


@pytest.mark.skipif(sys.version_info < (3, 11), reason="asyncio tells nobody that a task was cancelled by Ctrl-C")
def test_f25_ctrl_c_in_a_script_with_asyncio_is_the_same_sentence(shared_daemon: Host) -> None:
    process = shared_daemon.popen(
        HEAD
        + """
import asyncio
@remote(direct)
def forever(path):
    open(path, "w").close()
    time.sleep(600)
async def main(): await asyncio.gather(forever(sys.argv[1]), forever(sys.argv[1]))
asyncio.run(main())
""",
        str(shared_daemon.project / "ctrlc-async"),
    )
    wait_until((shared_daemon.project / "ctrlc-async").exists, 20)
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert [line[:24] for line in err.splitlines()] == ["remoted: interrupted at "]


def test_f25_ctrl_c_in_code_of_the_scripts_own_is_shown_as_ever(shared_daemon: Host) -> None:
    process = shared_daemon.popen(
        HEAD
        + """
@remote(direct)
def f(): return 1
f().result()
def mine():
    print("begun", flush=True)
    time.sleep(600)
f.local() and mine()
"""
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begun\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert err.splitlines()[0].startswith("Traceback")
    assert "in mine" in err


def test_f25_the_callers_death_ends_a_blocking_call_and_not_a_detached_one(shared_daemon: Host) -> None:
    process = shared_daemon.popen(
        HEAD
        + """
@remote(queue, max_retries=0)
def work(path, seconds):
    open(path + ".begun", "w").close()
    try: time.sleep(seconds)
    except KeyboardInterrupt: open(path + ".stopped", "w").close(); raise
    open(path + ".finished", "w").close()
base = sys.argv[1]
detached = work.options(detach=True)(base + "d", 2)
print(detached.id, flush=True)
work(base + "b", 600).result()
""",
        str(shared_daemon.project / "f25x"),
    )
    assert process.stdout is not None
    job = process.stdout.readline().strip()
    wait_until(lambda: all((shared_daemon.project / f"f25x{kind}.begun").exists() for kind in "bd"), 20)
    process.kill()
    process.communicate(timeout=20)
    wait_until((shared_daemon.project / "f25xb.stopped").exists, 20)
    result = shared_daemon.run(HEAD + "print(json.dumps(str(Job.from_id(sys.argv[1]).result().status)))", job)
    assert result.json == "COMPLETED"
    assert (shared_daemon.project / "f25xd.finished").exists()


def test_f26_a_job_is_found_by_its_id_from_another_process(shared_daemon: Host) -> None:
    made = shared_daemon.run(
        HEAD
        + """
@remote(queue)
def work(x):
    print("printed")
    return {"x": x}
out = work(4).result()
print(json.dumps(out.id))
"""
    ).json
    result = shared_daemon.run(
        HEAD
        + """
h = Job.from_id(sys.argv[1])
out = h.result()
unknown = Job.from_id("0" * 32)
try: unknown.result()
except SubmissionRefused as error: code = error.code
print(json.dumps([str(h.status()), out.output, h.logs(), out.stdout, h.done(), h.cancel(), code]))
""",
        made,
    )
    assert result.out == result.out.splitlines()[-1] + "\n", "replayed output is not printed"
    assert result.json == ["COMPLETED", {"x": 4}, "printed\n", "printed\n", True, False, "NOT_FOUND"]


def test_f29_nested_calls_never_deadlock_and_end_with_their_parent(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
import os
one = CpuLiveServerless(name="nested", workersMax=1, cpuCount=1)
@remote(one)
def down(n): return n if n == 0 else down(n - 1).result().unwrap() + 1
@remote(one)
async def adown(n): return n if n == 0 else (await adown(n - 1)).unwrap() + 1
@remote(one, max_retries=0)
def parent(path): return child(path).result().unwrap()
@remote(one, max_retries=0)
def child(path):
    open(path, "w").close()
    try: time.sleep(600)
    finally: open(path + ".stopped", "w").close()
print(down(4).result().unwrap(), asyncio.run(adown(3)).unwrap())
try: down(20).result().unwrap()
except SubmissionRefused as error: print(error.code)
h = parent(sys.argv[1])
while not os.path.exists(sys.argv[1]): time.sleep(0.01)
h.cancel()
print(h.result().status)
while not os.path.exists(sys.argv[1] + ".stopped"): time.sleep(0.01)
""",
        str(shared_daemon.project / "f29"),
    )
    assert result.out.split() == ["4", "3", "TOO_DEEP", "CANCELLED"]


def test_f10_two_jobs_with_two_cpus_do_not_overlap_on_a_host_with_two(bare_host: Host) -> None:
    bare_host.config.write_text("cpus = 2\n", encoding="utf-8")
    result = bare_host.start().run(
        HEAD
        + """
two = CpuLiveServerless(name="two", cpuCount=2)
free = CpuLiveServerless(name="free")
def spans(config):
    @remote(config)
    def span():
        began = time.time(); time.sleep(0.4)
        return [began, time.time()]
    list(span.map_nothing) if False else None
    handles = [span(), span()]
    return sorted(h.result().output for h in handles)
reserved, shared = spans(two), spans(free)
print(json.dumps([reserved[0][1] <= reserved[1][0], shared[0][1] > shared[1][0]]))
""".replace("    list(span.map_nothing) if False else None\n", "")
    )
    assert result.json == [True, True]


def test_f30_options_of_a_call_and_max_concurrency_of_a_config(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
together = CpuLiveServerless(name="together", workersMax=1, max_concurrency=4)
inside = most = 0
@remote(together)
async def overlap(n):
    global inside, most
    print("begin", n)
    inside += 1; most = max(most, inside)
    await asyncio.sleep(0.3)
    inside -= 1
    print("end", n)
    return most
async def main():
    outs = await asyncio.gather(*(overlap(n) for n in range(4)))
    assert [o.stdout for o in outs] == [f"begin {n}\\nend {n}\\n" for n in range(4)], outs
    return max(o.output for o in outs)
overlap(9).result()
print(json.dumps(asyncio.run(main())))
"""
    )
    assert result.json == 4, "four bodies at once in one worker, each with its own output"


def test_f11_a_template_limits_memory_and_the_end_is_named_out_of_memory(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
import resource
small = CpuLiveServerless(name="small", podTemplate=PodTemplate(memory_gb=1))
@remote(small, max_retries=0)
def hog(size):
    return [len(bytearray(size)), resource.getrlimit(resource.RLIMIT_NOFILE)[0]]
resource.setrlimit(resource.RLIMIT_NOFILE, (512, resource.getrlimit(resource.RLIMIT_NOFILE)[1]))
good, bad = hog(1000).result(), hog(2 << 30).result()
print(json.dumps([good.output, str(bad.status), bad.state_reason, "MemoryError" in bad.error]))
"""
    )
    assert result.json == [[1000, 512], "FAILED", "OOM_RAM", True]
