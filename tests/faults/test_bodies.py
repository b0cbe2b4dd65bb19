"""Bodies that misbehave: each has a sane outcome, the daemon is unharmed and nothing is left behind."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tests.faults.rawclient import daemon_process, resident_bytes
from tests.harness import Host, host, wait_until

HEAD = """
import json, os, select, signal, sys, time
from remoted_client import *
from remoted_client import remote, context, CpuLiveServerless, CpuLiveLoadBalancer, Job
queue = CpuLiveServerless(name="queue", workersMax=2)
direct = CpuLiveLoadBalancer(name="direct", workersMax=2)
def token(path):
    with open(path, "a") as file: file.write(context.running_call().attempt + "\\n")
"""


@pytest.fixture(scope="module")
def quick() -> Iterator[Host]:
    """A daemon whose ladder of signals is short, so that the tests are."""
    with host(
        "[limits]\ncancel_term_seconds = 0.5\ncancel_kill_seconds = 1.5\nretry_base_seconds = 0.05\nlog_bytes_per_job = 4000000\n"
    ) as made:
        yield made.start()


def is_dead(pid: int) -> bool:
    try:
        return bool(psutil.Process(pid).status() == psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True


def pids(path: Path, count: int) -> list[int]:
    """The process ids that a body wrote, one a line."""
    wait_until(lambda: path.exists() and path.read_text(encoding="utf-8").count("\n") >= count, 20)
    return [int(line) for line in path.read_text(encoding="utf-8").split()]


# -- a worker that dies (T55) --------------------------------------------------------------------------------


def test_t55_a_killed_worker_is_retried_while_attempts_are_left(quick: Host) -> None:
    result = quick.run(
        HEAD
        + """
@remote(queue, max_retries=2)
def die(path, times):
    token(path)
    if len(open(path).readlines()) <= times: os.kill(os.getpid(), signal.SIGKILL)
    return "survived"
found = []
for number, times in enumerate((1, 2, 9)):
    path = os.path.abspath(f"tokens{number}")
    out = die(path, times).result()
    lines = open(path).read().split()
    found.append([out.status, out.state_reason, out.output, out.attempts, len(lines), len(set(lines)), out.error])
once = die.options(max_retries=0)(os.path.abspath("tokens9"), 9).result()
print(json.dumps([*found, [once.status, once.attempts, len(open("tokens9").readlines())]]))
"""
    )
    first, second, third, once = result.json
    assert first[:6] == ["COMPLETED", first[1], "survived", 2, 2, 2]
    assert second[:6] == ["COMPLETED", second[1], "survived", 3, 3, 3]
    assert third[:6] == ["FAILED", "WORKER_DIED", None, 3, 3, 3]
    assert "SIGKILL" in third[6]
    assert once == ["FAILED", 1, 1]


def test_t55_a_direct_call_in_a_killed_worker_raises_worker_lost_and_is_not_repeated(quick: Host) -> None:
    result = quick.run(
        HEAD
        + """
@remote(direct)
def die(path):
    token(path)
    os.kill(os.getpid(), signal.SIGKILL)
path = os.path.abspath("direct-tokens")
try: die(path).result()
except WorkerLost as error: print(json.dumps([error.reason, str(error), len(open(path).readlines())]))
"""
    )
    reason, text, lines = result.json
    assert (reason, lines) == ("WORKER_DIED", 1)
    assert "SIGKILL" in text


def test_t55_a_worker_killed_while_idle_costs_the_next_call_nothing(quick: Host) -> None:
    """Its death may be noticed only when the next call is on its way to it."""
    result = quick.run(
        HEAD
        + """
one = CpuLiveServerless(name="one", workersMax=1)
@remote(one, max_retries=0)
def pid(): return os.getpid()
found = []
for _ in range(10):
    victim = pid().result().unwrap()
    fd = os.pidfd_open(victim)
    os.kill(victim, signal.SIGKILL)
    select.select([fd], [], [])
    out = pid().result()
    found.append([out.status, out.error])
print(json.dumps(found))
"""
    )
    assert result.json == [["COMPLETED", None]] * 10


def test_t55_sys_exit_and_os_exit_are_told_apart(quick: Host) -> None:
    result = quick.run(
        HEAD
        + """
@remote(queue, max_retries=0)
def leave(how):
    if how == "os": os._exit(7)
    if how == "thread":
        import threading
        threading.Thread(target=os._exit, args=(8,)).start()
        time.sleep(30)
    sys.exit({"none": None, "number": 3, "text": "goodbye"}[how])
print(json.dumps([[o.status, o.state_reason, o.error] for o in leave.map(["none", "number", "text", "os", "thread"])]))
"""
    )
    none, number, text, os_exit, thread = result.json
    assert none[:2] == number[:2] == text[:2] == ["FAILED", "EXITED"]
    assert "3" in number[2]
    assert os_exit[:2] == thread[:2] == ["FAILED", "WORKER_DIED"]
    assert "code 7" in os_exit[2]
    assert "code 8" in thread[2]


def test_t55_the_recursion_limit_is_an_exception_and_the_worker_lives(quick: Host) -> None:
    result = quick.run(
        HEAD
        + """
one = CpuLiveServerless(name="one", workersMax=1)
@remote(one, max_retries=0)
def deep(n): return deep.local(n).result() if n < 0 else deeper(n)
def deeper(n): return deeper(n + 1)
@remote(one)
def pid(): return os.getpid()
before = pid().result().output
out = deep(1).result()
print(json.dumps([out.status, out.state_reason, type(out.exception).__name__, before == pid().result().output]))
"""
    )
    assert result.json == ["FAILED", "EXCEPTION", "RecursionError", True]


def test_t55_a_segfault_names_its_signal(quick: Host) -> None:
    result = quick.run(
        HEAD
        + """
@remote(queue, max_retries=0)
def crash():
    import ctypes
    ctypes.string_at(0)
out = crash().result()
print(json.dumps([out.status, out.state_reason, out.error]))
"""
    )
    assert result.json[:2] == ["FAILED", "WORKER_DIED"]
    assert "SIGSEGV" in result.json[2]


# -- streams and descriptors ---------------------------------------------------------------------------------


def test_f22_a_body_that_closes_0_to_2_harms_only_itself(quick: Host) -> None:
    result = quick.run(
        HEAD
        + """
one = CpuLiveServerless(name="one", workersMax=1)
@remote(one, max_retries=0)
def close(how):
    print("before", flush=True)
    if how == "fds":
        for fd in (0, 1, 2): os.close(fd)
    elif how == "objects":
        for stream in (sys.stdin, sys.stdout, sys.stderr): stream.close()
    elif how == "replace": sys.stdout = sys.stderr = open(os.devnull, "w")
    elif how == "reuse":
        for fd in (0, 1, 2): os.close(fd)
        for _ in range(3): os.open("/dev/null", os.O_RDWR)
    return os.getpid()
found = []
for how in ("fds", "objects", "replace", "reuse", "nothing"):
    out = close(how).result()
    found.append([out.status, out.error, out.stdout])
    found.append(out.output)
print(json.dumps([found[::2], len(set(found[1::2]))]))
"""
    )
    found, workers = result.json
    assert found == [["COMPLETED", None, "before\n"]] * 5
    assert workers == 1, "the worker lives on"


def test_a_body_that_closes_every_descriptor_loses_its_worker_and_that_is_said(quick: Host) -> None:
    """Daemonizing code does ``os.closerange(3, 1024)``; the channel is among them."""
    result = quick.run(
        HEAD
        + """
@remote(queue, max_retries=0)
def close():
    os.closerange(3, 1024)
    time.sleep(0.2)
    return 1
@remote(queue)
def fine(): return 2
out = close().result()
print(json.dumps([out.status, out.state_reason, fine().result().output]))
"""
    )
    assert result.json == ["FAILED", "WORKER_DIED", 2]


def test_f22_a_hundred_megabytes_of_output_are_capped_and_the_daemon_stays_small(quick: Host) -> None:
    quick.run(HEAD + "@remote(queue)\ndef f(): return 1\nf().result()\n")
    before = resident_bytes(quick)
    result = quick.run(
        HEAD
        + """
@remote(queue, max_retries=0)
def chatter():
    line = "x" * 999 + "\\n"
    for _ in range(100_000): sys.stdout.write(line)
    return "done"
import io
real, sys.stdout, sys.stderr = sys.stdout, io.StringIO(), io.StringIO()
out = chatter().result()
shown = sys.stderr.getvalue()
sys.stdout = real
print(json.dumps([out.status, out.output, len(out.stdout), "is not kept" in out.stderr, "is not kept" in shown]))
""",
        timeout=100,
    )
    status, output, kept, noticed, shown = result.json
    assert (status, output, noticed, shown) == ("COMPLETED", "done", True, True)
    assert 3_500_000 < kept <= 4_000_000
    assert resident_bytes(quick) - before < 32 << 20


# -- processes (T45) -----------------------------------------------------------------------------------------


def test_t45_a_body_that_forks_and_returns_is_over_when_it_returns(quick: Host) -> None:
    result = quick.run(
        HEAD
        + """
one = CpuLiveServerless(name="one", workersMax=1)
@remote(one, max_retries=0)
def fork():
    for _ in range(3):
        if os.fork() == 0:
            time.sleep(600)
            os._exit(0)
    return os.getpid()
begun = time.monotonic()
first, second = fork().result(), fork().result()
print(json.dumps([first.status, second.status, first.output == second.output, time.monotonic() - begun]))
"""
    )
    assert result.json[:3] == ["COMPLETED", "COMPLETED", True]
    assert result.json[3] < 15


def test_a_forked_child_that_returns_into_the_runtime_does_not_answer_for_its_parent(quick: Host) -> None:
    """``if os.fork() == 0: return``: two processes would say DONE for one attempt."""
    result = quick.run(
        HEAD
        + """
one = CpuLiveServerless(name="forky", workersMax=1)
@remote(one, max_retries=0)
def fork():
    parent = os.getpid()
    if os.fork() == 0: return "the child"
    time.sleep(0.3)
    return "the parent"
@remote(one)
def after(): return "after"
out = fork().result()
print(json.dumps([out.status, out.output, [after().result().output for _ in range(5)]]))
"""
    )
    assert result.json == ["COMPLETED", "the parent", ["after"] * 5]


DAEMONIZE = """
def daemonize(path):
    for _ in range(3):
        if os.fork() == 0:
            os.setsid()
            if os.fork() == 0:
                signal.signal(signal.SIGTERM, signal.SIG_IGN)
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                with open(path, "a") as file: file.write(f"{os.getpid()}\\n")
                while True: time.sleep(60)
            os._exit(0)
    while len(open(path).readlines()) < 3: time.sleep(0.01)
    time.sleep(600)
"""


@pytest.mark.parametrize("how", ["cancel", "timeout", "exit"])
def test_t45_daemons_that_a_stopped_body_left_are_dead(quick: Host, how: str) -> None:
    path = quick.project / f"daemons-{how}"
    path.touch()
    end = {"cancel": "h.cancel()", "timeout": "", "exit": "sys.exit(0)"}[how]
    quick.run(
        HEAD
        + DAEMONIZE
        + f"""
@remote(queue, max_retries=0, timeout={3 if how == "timeout" else 600})
def body(path): daemonize(path)
h = body({str(path)!r})
while len(open({str(path)!r}).readlines()) < 3: time.sleep(0.01)
{end}
out = h.result()
assert out.status == {"CANCELLED" if how == "cancel" else "TIMED_OUT"!r}, out
""",
    )
    found = pids(path, 3)
    assert len(found) == 3
    wait_until(lambda: all(map(is_dead, found)), 10, lambda: f"alive: {[pid for pid in found if not is_dead(pid)]}")


@pytest.mark.parametrize("how", ["listens", "ignores", "end"])
def test_t45_a_daemon_that_cleared_its_environment_is_found_all_the_same(quick: Host, how: str) -> None:
    """Nothing in it names its worker: only the tree does."""
    path = quick.project / f"cleared-{how}"
    pool = f'CpuLiveServerless(name="cleared-{how}", workersMax=1, idleTimeout=1)'
    quick.run(
        HEAD
        + f"""
@remote({pool}, max_retries=0)
def body(path):
    if {how == "ignores"}:
        for number in (signal.SIGINT, signal.SIGTERM): signal.signal(number, signal.SIG_IGN)
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            open(path, "w").write(f"{{os.getpid()}}\\n")
            os.execve("/bin/sleep", ["sleep", "600"], {{}})
        os._exit(0)
    os.wait()
    if {how == "end"}: return
    time.sleep(600)
h = body({str(path)!r})
while not (os.path.exists({str(path)!r}) and open({str(path)!r}).read()): time.sleep(0.01)
if {how != "end"}: h.cancel()
h.result()
"""
    )
    (pid,) = pids(path, 1)
    wait_until(lambda: is_dead(pid), 15)


# -- stopping (F24, F25) -------------------------------------------------------------------------------------


STUBBORN = {
    "swallowed": """
    for _ in range(600):
        try: time.sleep(1)
        except KeyboardInterrupt: pass
""",
    "swallowed-all": """
    while True:
        try:
            while True: time.sleep(1)
        except BaseException: pass
""",
    "ignored": """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    while True: time.sleep(1)
""",
    "stopped": """
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(600)
""",
    "in-c": """
    libc.sleep(600)  # with the interpreter's lock held: no Python runs in this process any more
""",
}


@pytest.mark.parametrize("how", STUBBORN)
@pytest.mark.parametrize("kind", ["queue", "direct"])
def test_f25_a_body_that_does_not_listen_is_killed(quick: Host, how: str, kind: str) -> None:
    mark = quick.project / f"stubborn-{how}-{kind}"
    begun = time.monotonic()
    result = quick.run(
        HEAD
        + f"""
@remote({kind})
def body(path):
    import ctypes
    libc = ctypes.PyDLL(None)
    open(path, "w").write(f"{{os.getpid()}}\\n")
{STUBBORN[how]}
h = body({str(mark)!r})
while not os.path.exists({str(mark)!r}): time.sleep(0.01)
h.cancel()
try: print(h.result().status)
except JobCancelled: print("CANCELLED")
@remote({kind})
def fine(): return 1
fine().result()
""",
    )
    assert result.out.split() == ["CANCELLED"]
    assert time.monotonic() - begun < 12
    assert is_dead(pids(mark, 1)[0])


def test_f25_a_body_that_listens_keeps_its_worker_warm(quick: Host) -> None:
    result = quick.run(
        HEAD
        + """
one = CpuLiveServerless(name="warm", workersMax=1)
@remote(one)
def pid(): return os.getpid()
@remote(one)
def sleep(path):
    open(path, "w").close()
    time.sleep(600)
@remote(one)
async def asleep(path):
    import asyncio
    open(path, "w").close()
    await asyncio.sleep(600)
before = pid().result().output
found = []
for number, body in enumerate((sleep, asleep)):
    h = body(os.path.abspath(f"listens{number}"))
    while not os.path.exists(f"listens{number}"): time.sleep(0.01)
    h.cancel()
    out = h.result()
    found.append([out.status, out.state_reason])
print(json.dumps([found, before == pid().result().output]))
"""
    )
    assert result.json == [[["CANCELLED", "CANCELLED"]] * 2, True]


def test_f24_a_timeout_really_stops_the_code_and_is_not_retried(quick: Host) -> None:
    path = quick.project / "late"
    result = quick.run(
        HEAD
        + f"""
@remote(queue, timeout=1, max_retries=3)
def body(path):
    token(path)
    while True: time.sleep(0.01)
out = body({str(path)!r}).result()
print(json.dumps([out.status, out.state_reason, out.attempts]))
""",
    )
    assert result.json == ["TIMED_OUT", "TIMEOUT", 1]
    assert len(path.read_text(encoding="utf-8").split()) == 1


def test_f25_a_sigint_that_is_no_cancel_is_the_bodys_own(quick: Host) -> None:
    result = quick.run(
        HEAD
        + """
import asyncio
one = CpuLiveServerless(name="one", workersMax=1)
@remote(one, max_retries=0)
def interrupt(catches):
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(30)
    except KeyboardInterrupt:
        if not catches: raise
    return "caught"
@remote(one, max_retries=0)
async def interrupt_loop():
    os.kill(os.getpid(), signal.SIGINT)
    await asyncio.sleep(30)
@remote(one)
def pid(): return os.getpid()
def seen(handle):
    out = handle.result()
    return [out.status, out.state_reason, out.output, type(out.exception).__name__]
before = pid().result().unwrap()
found = [seen(interrupt(False)), seen(interrupt(True)), seen(interrupt_loop())]
print(json.dumps([*found, pid().result().unwrap() == before]))
"""
    )
    raised, caught, cancelled, same_worker = result.json
    assert raised == ["FAILED", "EXCEPTION", None, "KeyboardInterrupt"]
    assert caught == ["COMPLETED", "", "caught", "NoneType"]
    assert cancelled == ["FAILED", "EXCEPTION", None, "CancelledError"]
    assert same_worker


def test_a_handle_waited_for_in_a_thread_survives_ctrl_c_in_the_main_thread(quick: Host) -> None:
    result = quick.run(
        HEAD
        + """
import threading
@remote(queue)
def body(x):
    time.sleep(1)
    return x
found = []
waiter = threading.Thread(target=lambda: found.append(body(1).result().status))
waiter.start()
try:
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    out = body(2).result()
except KeyboardInterrupt: found.append("interrupted")
waiter.join()
print(json.dumps(found))
"""
    )
    assert result.json == ["interrupted", "COMPLETED"]


def test_nothing_is_left_behind(quick: Host) -> None:
    """After all of the above: only idle workers hang below the daemon, no zombie, no orphan."""

    def leftovers() -> list[str]:
        children = daemon_process(quick).children()  # what hangs below a warm worker is its body's
        return [repr(child) for child in children if is_dead(child.pid)]

    def look_again() -> bool:
        """A worker's death is when the daemon looks for what others left."""
        quick.run(HEAD + "@remote(queue, max_retries=0)\ndef f(): os._exit(1)\nf().result()\n")
        return not leftovers()

    wait_until(look_again, 30, lambda: "\n".join(leftovers()))
    assert "Traceback" not in quick.log(), quick.log()
