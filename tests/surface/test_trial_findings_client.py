"""What a new user ran into: each of these was a silence, a wrong word or a value in the wrong place."""

from __future__ import annotations

import json
import os
import pty
import subprocess
import sys
import time
from pathlib import Path

import remoted
from tests.harness import Host, wait_until

HEAD = """
import asyncio, json, logging, os, sys, time
import remoted_client as rc
from remoted_client import *
from remoted_client import remote, CpuLiveServerless, CpuLiveLoadBalancer, Job, as_completed
queue = CpuLiveServerless(name="queue")
direct = CpuLiveLoadBalancer(name="direct")
"""


def _files_with(word: str, folder: Path) -> list[str]:
    return subprocess.run(["grep", "-rlae", word, str(folder)], capture_output=True, text=True, check=False).stdout.split()


def test_f16_no_literal_of_env_is_kept_by_the_daemon(shared_daemon: Host) -> None:
    shared_daemon.write(
        "with_values.py",
        '''
        import os
        import remoted_client as rc
        from remoted_client import remote as far
        config = rc.CpuLiveServerless(name="m", env={"IN_CONFIG": "literal-a"})
        @far(config, env={
            "LONG": """literal-b
        and more""", "SUM": "literal-c" + "é",
        })
        def step(): return [os.environ[name][::-1] for name in ("IN_CONFIG", "LONG", "SUM")]
        @far(config, max_retries=0)
        def fails(): raise ValueError("line 13")
        ''',
    )
    result = shared_daemon.run(
        HEAD
        + """
import with_values
NAMED = "literal-d"
config = CpuLiveServerless(name="x", env={"IN_CONFIG": "literal-e"})
@remote(config, env={"PLAIN": "literal-f", "NAMED": NAMED})
def f(): return [os.environ[name][::-1] for name in ("IN_CONFIG", "PLAIN", "NAMED")], config.name
print(json.dumps([f().result().unwrap(), with_values.step().result().unwrap(), with_values.fails().result().exception.remote_traceback]))
"""
    )
    ((names, config), module, trace) = result.json
    assert [value[::-1] for value in names] == ["literal-e", "literal-f", "literal-d"]
    assert config == "x"
    assert [value[::-1] for value in module] == ["literal-a", "literal-b\nand more", "literal-cé"]
    assert 'with_values.py", line 11, in fails\n    def fails(): raise ValueError("line 13")' in trace.replace("line 12", "line 11")
    wait_until(lambda: not _files_with("literal-", shared_daemon.state), 10, lambda: str(_files_with("literal-", shared_daemon.state)))


def test_f16_a_nested_function_has_the_values_of_its_own_env(shared_daemon: Host) -> None:
    shared_daemon.write(
        "inner.py",
        """
        import os
        from remoted_client import CpuLiveServerless, remote
        @remote(CpuLiveServerless(name="inner"), env={"OF_INNER": "module"})
        def step(): return os.environ["OF_INNER"]
        """,
    )
    result = shared_daemon.run(
        HEAD
        + """
import inner
@remote(CpuLiveServerless(name="leaf"), env={"OF_LEAF": "script"})
def leaf(): return os.environ["OF_LEAF"]
@remote(queue)
def parent(): return [leaf().result().unwrap(), inner.step().result().unwrap()]
print(json.dumps(parent().result().unwrap()))
"""
    )
    assert result.json == ["script", "module"]


def test_f22_logging_is_set_up_in_the_worker_as_in_the_script(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(queue)
def f():
    logging.debug("no")
    logging.getLogger("app").info("yes")
before = f().result()
logging.basicConfig(level=logging.INFO, format="{levelname}|{name}|{message}", style="{")
after = f().result()
print(json.dumps([before.stderr, after.stderr]))
"""
    )
    assert result.json == ["", "INFO|app|yes\n"]


def test_c02_another_socket_folder_beside_a_running_daemon_is_refused_with_the_reason(shared_daemon: Host) -> None:
    began = time.monotonic()
    result = shared_daemon.run(
        HEAD
        + """
@remote(queue)
def f(): pass
try: f().result()
except DaemonUnreachable as error: print(error)
""",
        REMOTED_SOCKET=str(shared_daemon.folder / "other"),
    )
    assert "another daemon of yours holds" in result.out
    assert "unset REMOTED_SOCKET" in result.out
    assert "XDG_STATE_HOME" in result.out
    assert time.monotonic() - began < 20


def test_f26_the_beginning_of_an_id_will_do_and_an_impossible_one_is_refused_at_once(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(queue)
def f(n): time.sleep(n); return n
h = f(0)
out = h.result()
short = h.id[:8]
found = [Job.from_id(short).result().output, Job.from_id(short).id == h.id, str(Job.from_id(short).status())]
running = f(1)
found += [Job.from_id(running.id[:10]) is running, Job.from_id(running.id).result().output, running.result().output]
for make in (lambda: Job.from_id("abcdef01").result(), lambda: Job.from_id("abcdef01").id, lambda: Job.from_id(5), lambda: Job.from_id(""), lambda: Job.from_id("xyz"), lambda: Job.from_id("local-1")):
    try: make()
    except Exception as error: found.append(type(error).__name__)
print(json.dumps(found))
"""
    )
    assert result.json == [0, True, "COMPLETED", True, 1, 1, "SubmissionRefused", "SubmissionRefused", "TypeError", "ValueError", "ValueError", "ValueError"]


def test_f03_a_forgotten_await_is_named_where_the_handle_is_taken_for_the_result(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
import pickle
@remote(queue)
def f(n): return {"n": n}
@remote(queue)
def g():
    yield 1
    yield 2
h = f(1)
for make in (
    lambda: h.output, lambda: h["n"], lambda: len(h), lambda: list(h), lambda: h.result(timeout="1"), lambda: h.result(timeout=-1),
    lambda: pickle.dumps(h), lambda: f(h), lambda: list(as_completed([1, 2])),
):
    try: make()
    except Exception as error: print(type(error).__name__, error)
assert h, "a handle is true"
items = g()
print([next(items), next(items), next(items, None)])
"""
    )
    lines = result.out.splitlines()
    assert [line.split()[0] for line in lines] == ["AttributeError", *["TypeError"] * 4, "ValueError", "TypeError", "SerializationError", "TypeError", "[1,"]
    assert all("(await f(...))" in line and "f(...).result()" in line for line in lines[:4])
    assert all("Job.from_id(id)" in line for line in lines[6:8])


def test_f20_an_attribute_of_a_remote_instance_is_not_set_in_silence(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(queue)
class Model:
    def get(self): return 1
m = Model()
try: m.size = 3
except AttributeError as error: print(error)
print(m.get().result().output)
"""
    )
    assert result.out.splitlines() == ["cannot set size: the instance of Model lives in a worker; give the class a method that sets it", "1"]


def test_f05_whoever_waits_at_a_terminal_is_told_why(shared_daemon: Host) -> None:
    script = shared_daemon.write(
        "waits.py",
        HEAD
        + """
one = CpuLiveServerless(name="one", workersMax=1)
both = CpuLiveLoadBalancer(name="both", workersMax=1)
@remote(one)
def slow(): time.sleep(4)
@remote(one)
def quick(): pass
@remote(both)
def slow_too(): time.sleep(4)
@remote(both)
async def quick_too(): pass
first = slow(); first.id
quick().result()
async def main():
    first = slow_too()
    while first.status() != "IN_PROGRESS": await asyncio.sleep(0.01)
    await quick_too()
asyncio.run(main())
""",
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, str(script)], env=shared_daemon.environ, cwd=shared_daemon.project, stdout=subprocess.DEVNULL, stderr=theirs)
    os.close(theirs)
    assert process.wait(60) == 0
    lines = os.read(ours, 65536).decode().splitlines()
    os.close(ours)
    assert lines == [f"remoted: {name} waits: all workers of its pool are busy (workersMax=1) (WAITING_WORKER)" for name in ("quick", "quick_too")]


def test_f22_output_that_was_cut_says_so() -> None:
    from remoted_client.printed import Printed

    printed = Printed(echo=False)
    for _ in range(20):
        printed.add(1, b"x" * (1 << 20))
    text = printed.text(1, "abc")
    assert text.startswith("[remoted: the first 4,194,304 characters are not here; `remotectl logs abc` has them]\n")
    assert len(text) < (16 << 20) + 200
    assert printed.text(2, "abc") == ""


def test_f06_a_refusal_says_what_to_do() -> None:
    from remoted_client.errors import for_code

    assert "raise workersMax" in str(for_code("POOL_BUSY", "cannot run f"))
    assert "REMOTED_LOCAL=1" in str(for_code("NO_MATCHING_GPU", "cannot run f"))


def test_f04_errors_are_named_by_what_went_wrong_and_say_what_to_do(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
import threading
small = CpuLiveServerless(name="small", podTemplate=PodTemplate(memory_gb=1))
def errors(function): return remote(small, max_retries=0)(function)().result().error
def locked(): return {"a": threading.Lock()}
def hog(): bytearray(2 << 30)
def silent(): raise KeyError
@remote(small, max_retries=0)
class Model:
    def __init__(self): raise ValueError("no weights")
    def get(self): pass
def elsewhere():
    import types
    module = sys.modules["only_there"] = types.ModuleType("only_there", "")
    exec("class A: pass", vars(module))
    module.__spec__ = types.SimpleNamespace(name="only_there", loader=None)
    return module.A()
print(json.dumps([errors(locked), errors(hog), errors(silent), Model().get().result().error, errors(elsewhere)]))
"""
    )
    locked, hog, silent, model, elsewhere = result.json
    assert locked.startswith("SerializationError: cannot send the result['a'] (_thread.lock): ")
    assert "return plain data" in locked
    assert hog == "MemoryError: the worker may use 1 GiB, the memory_gb of its config"
    assert silent == "KeyError"
    assert model == "ValueError: no weights (raised by the constructor of the instance, before get() was called)"
    assert "install only_there here too, or return plain data" in elsewhere


def test_f01_a_slip_at_decoration_is_named_and_what_has_no_effect_is_said(bare_host: Host) -> None:
    result = bare_host.run(
        HEAD
        + """
import warnings
def told(make):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try: make()
        except Exception as error: return f"{type(error).__name__} {error}"
        return [[str(each.message).split("=")[0], each.lineno] for each in caught]
f = remote(queue)(len)
both = LiveLoadBalancer(name="both", preload="torch", preemptible=True, gpu_memory_gb=3)
def decorate():
    @remote(
        both,
        max_retries=3,
        system_dependencies=["ffmpeg"],
    )
    def g(): pass
print(json.dumps([told(make) for make in (
    lambda: remote(queue, dependencies=["numpy=="]), lambda: remote(queue, dependencies=["numpy>=1.2,<3", "torch[x] ; python_version<'4'"]),
    lambda: rc.LiveServerles, lambda: GpuGroup.AMPERE_25, lambda: LiveServerless(name="x", gpus=["A100"]), lambda: CpuLiveServerless(),
    lambda: f.options(timeuot=3), lambda: f.map([], progres=True), lambda: remote(CpuLiveServerless(name="queue", workersMax=7)), decorate,
)]))
print(rc.__version__, f.map([1, 2]))
"""
    )


    *lines, last = result.out.splitlines()
    wrong, right, module, group, card, nameless, option, word, size, idle = json.loads(lines[-1])
    assert wrong.startswith("ValueError cannot set dependencies[0]: 'numpy=='")
    assert right == []
    assert "did you mean 'LiveServerless'" in module
    assert "did you mean 'AMPERE_24'" in group
    assert "'NVIDIA A100 80GB PCIe'" in card
    assert nameless.startswith("TypeError cannot make CpuLiveServerless: it has no name")
    assert "did you mean 'timeout'" in option
    assert "did you mean 'progress'" in word
    assert size[0][0].startswith("two configs CpuLiveServerless(name")
    names = [name for name, _ in idle]
    assert names == ["system_dependencies", "max_retries", "preemptible", "gpu_memory_gb"]
    assert len({line for _, line in idle}) == 1
    assert last == f"{remoted.__version__} <map of 2 calls of len: iterate over it for the results; nothing is called before>"
    assert not bare_host.sockets.exists()


def test_f23_a_call_here_ends_as_it_would_in_a_worker(bare_host: Host) -> None:
    result = bare_host.run(
        HEAD
        + """
tries = 0
@remote(queue, timeout=0.2, max_retries=2)
def slow(): time.sleep(30)
@remote(queue, timeout=0.2)
async def slow_too(): await asyncio.sleep(30)
@remote(queue, max_retries=2)
def flaky():
    global tries
    tries += 1
    if tries < 3: raise ValueError
    return tries
@remote(queue)
async def items():
    for i in range(3): yield i
@remote(queue)
class Model:
    def __init__(self, x): self.x = x
    def get(self): return self.x
first = items.local()
out = flaky.local().result()
os.environ["REMOTED_LOCAL"] = "1"
print(json.dumps([
    str(slow.local().result().status), str(slow_too.local().result().status), out.output, out.attempts, list(items.local()), next(first),
    Model.local(3).get().result().output, "flaky" in repr(flaky()), flaky._settings.runs_here,
]))
os.environ["REMOTED_LOCAL"] = "false"
assert not flaky._settings.runs_here
"""
    )
    assert result.json == ["TIMED_OUT", "TIMED_OUT", 3, 3, [0, 1, 2], 0, 3, True, True]


def test_f03_a_progress_line_has_total_and_rate_and_ends_once(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(queue)
def f(n, m): return n + m
print(len(list(f.map([1, 2, 3], range(3), progress=True))))
"""
    )
    lines = result.err.strip().splitlines()
    assert len(lines) == 1
    assert lines[0].startswith("f: 3/3 in ")
    assert "/s" in lines[0]


def test_f04_sys_exit_is_told_alike_by_a_queue_and_by_a_direct_call(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
CODES = (3, "bye now", None, ["a", 1])
def leave(number): sys.exit(CODES[number])
def leave_at_once(): yield sys.exit("no item")
queued, called = remote(queue, max_retries=0)(leave), remote(direct)(leave)
found = []
for number in range(len(CODES)):
    job = queued(number).result()
    try:
        job.unwrap()  # it must not end this script
    except rc.JobFailed as error:
        assert (str(error), error.__cause__) == (job.error, job.exception)
    try:
        called(number).result()
    except rc.JobFailed as error:
        found.append([job.error, str(error), type(error).__name__, error.reason, repr(error.__cause__) == repr(job.exception), "in leave" in str(error.__cause__.__cause__)])
try:
    list(remote(direct)(leave_at_once)())
except rc.JobFailed as error:
    found.append([str(error), error.reason, repr(error.__cause__)])
print(json.dumps(found))
"""
    )
    *calls, stream = result.json
    texts = ["sys.exit(3)", "sys.exit('bye now')", "sys.exit()", "sys.exit(['a', 1])"]
    assert calls == [[f"the function called {text}", f"the function called {text}", "JobFailed", "EXITED", True, True] for text in texts]
    assert stream == ["the function called sys.exit('no item')", "EXITED", "SystemExit('no item')"]


def test_f03_a_map_is_an_iterator_and_whoever_leaves_it_cancels_the_rest(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
from collections.abc import Iterator
@remote(queue, max_retries=0)
def f(n):
    if n == 9: raise ValueError("nine")
    return n
called = remote(direct)(lambda n: 1 // (n - 3))
@remote(queue, max_retries=0)
def slow(n): time.sleep(30 * bool(n))
results = f.map(range(4))
found = [isinstance(results, Iterator), next(results).output, [out.output for out in results], list(results), next(results, "end")]
one, two = f.map([1, 2, 3]), f.map([4, 5, 6])
found.append([[a.output, b.output] for a, b in zip(one, two)])
broken = called.map([0, 3, 5])
try: list(broken)
except ZeroDivisionError: found.append(list(broken))
handles = []
original = type(slow).__call__
type(slow).__call__ = lambda *a: handles.append(original(*a)) or handles[-1]
for out in slow.map(range(5)): break
type(slow).__call__ = original
found.append([str(handle.result().status) for handle in handles])
async def main():
    results = f.map(range(3))
    first = await anext(results)
    return [first.output, [out.output async for out in results], [out.output async for out in results]]
found.append(asyncio.run(main()))
print(json.dumps(found))
"""
    )
    is_iterator, first, rest, again, end, pairs, after_error, left, later = result.json
    assert (is_iterator, first, rest, again, end) == (True, 0, [1, 2, 3], [], "end")
    assert pairs == [[1, 4], [2, 5], [3, 6]]
    assert after_error == []
    assert left == ["COMPLETED", *["CANCELLED"] * 4]
    assert later == [0, [1, 2], []]


def test_f22_what_calls_print_does_not_stand_on_the_line_of_progress(shared_daemon: Host) -> None:
    script = shared_daemon.write(
        "progress.py",
        HEAD
        + """
@remote(CpuLiveServerless(name="in-turn", workersMax=1))
def f(n): print("line", n); time.sleep(0.2)
print(len(list(f.map(range(3), progress=True))))
""",
    )
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, str(script)], env=shared_daemon.environ, cwd=shared_daemon.project, stdout=theirs, stderr=theirs)
    os.close(theirs)
    assert process.wait(60) == 0
    lines = os.read(ours, 65536).decode().splitlines()
    os.close(ours)
    shown = [line.rpartition("\r")[2].replace("\x1b[K", "") for line in lines]
    assert [line for line in shown if "line" in line] == ["line 0", "line 1", "line 2"], shown
    assert shown[-2].startswith("f: 3/3 in ")
    assert shown[-1] == "3"


def test_f29_a_call_that_ends_with_its_parent_says_so(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
one = CpuLiveServerless(name="children", workersMax=1, max_concurrency=1)
@remote(one, max_retries=0)
def child(): time.sleep(600)
@remote(one, max_retries=0)
def parent(path):
    h = child()
    with open(path + "_", "w") as file: file.write(h.id)
    os.rename(path + "_", path)
    h.result().unwrap()  # its end may come before the interrupt
h = parent(sys.argv[1])
while not os.path.exists(sys.argv[1]): time.sleep(0.01)
h.cancel()
found = [h.result(), Job.from_id(open(sys.argv[1]).read()).result()]
print(json.dumps([[str(out.status), out.state_reason, out.error] for out in found]))
""",
        str(shared_daemon.project / "f29-child"),
    )
    assert result.json == [
        ["CANCELLED", "CANCELLED", "stopped: it was cancelled"],
        ["CANCELLED", "PARENT_ENDED", "stopped: the call whose body made it was cancelled, or is over"],
    ]


def test_f01_a_callable_without_a_signature_is_called_as_it_is(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
import functools
most = remote(queue)(functools.partial(max, 3))
print(json.dumps([most(4).result().output, most.local(2).result().output, remote(direct)(functools.partial(max, 3))(5).result()]))
try: LiveServerless(name="x", gpuCount=99)
except ValueError as error: print(error, file=sys.stderr)
"""
    )
    assert result.json == [4, 3, 5]
    assert "gpuCount" in result.err
    assert "64" in result.err
