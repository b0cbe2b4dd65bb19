"""Values that cannot travel: arguments, results and exceptions that do not pickle, or do not come back."""

from __future__ import annotations

from tests.harness import Host

HEAD = """
import json, os, sys, threading
from remoted_client import *
from remoted_client import remote, CpuLiveServerless, CpuLiveLoadBalancer
queue = CpuLiveServerless(name="queue")
direct = CpuLiveLoadBalancer(name="direct")
"""


def test_f18_an_argument_that_cannot_be_sent_is_named_by_its_path_before_anything_is_sent(bare_host: Host) -> None:
    result = bare_host.run(
        HEAD
        + """
class Config:
    def __init__(self): self.options = {"handles": [1, threading.Lock()]}
@remote(queue)
def f(data, config=None): pass
for call in (lambda: f(threading.Lock()), lambda: f(1, config=Config()), lambda: f(x for x in ())):
    try: call()
    except SerializationError as error:
        assert isinstance(error, TypeError)
        print(error.path, "|", error)
"""
    )
    first, second, third = result.out.splitlines()
    assert "data" in first
    assert "lock" in first
    assert "config" in second
    assert "options" in second
    assert "handles" in second
    assert "data" in third
    assert not bare_host.sockets.exists(), "no daemon was needed"


def test_f18_a_result_that_cannot_be_sent_is_named_and_not_tried_again(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(queue, max_retries=3)
def f(): return {"model": [1, threading.Lock()]}
@remote(direct)
def g(): return threading.Lock()
out = f().result()
h = g()
try: h.result()
except Exception as error: print(json.dumps([out.status, out.state_reason, out.error, out.attempts, type(error).__name__, str(error)]))
"""
    )
    status, reason, error, attempts, _, direct = result.json
    assert (status, reason, attempts) == ("FAILED", "RESULT_LOST", 1)
    assert "model" in error
    assert "lock" in error
    assert "lock" in direct


def test_a_result_that_cannot_be_read_at_the_caller_is_a_failed_job_that_says_so(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
HERE = os.getpid()
def explode(pid):
    if os.getpid() == pid: raise RuntimeError("cannot be rebuilt here")
class Bomb:
    def __init__(self, pid): self.pid = pid
    def __reduce__(self): return explode, (self.pid,)
@remote(queue, max_retries=0)
def f(pid): return Bomb(pid)
@remote(direct)
def g(pid): return Bomb(pid)
out = f(HERE).result()
again = f(HERE).result()
try: g(HERE).result()
except RemotedError as error: direct = str(error)
print(json.dumps([out.status, out.state_reason, out.error, out.output, again.status, direct]))
"""
    )
    status, reason, error, output, again, direct = result.json
    assert (status, reason, output, again) == ("FAILED", "RESULT_LOST", None, "FAILED")
    assert "cannot be rebuilt here" in error
    assert "cannot be rebuilt here" in direct


def test_an_exception_that_cannot_be_sent_comes_home_as_a_description(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
class Odd(Exception):
    def __init__(self, lock): super().__init__("the message", lock); self.lock = lock
class Rude(Exception):
    def __str__(self): raise OSError("no text for you")
    def __reduce__(self): raise OSError("no pickle for you")
@remote(queue, max_retries=0)
def f(kind):
    raise (Odd(threading.Lock()) if kind == "odd" else Rude())
@remote(direct)
def g(kind):
    raise (Odd(threading.Lock()) if kind == "odd" else Rude())
found = []
for kind in ("odd", "rude"):
    out = f(kind).result()
    try: g(kind).result()
    except Exception as error: direct = [type(error).__name__, repr(error.args) if kind == "odd" else ""]
    found.append([out.status, out.state_reason, out.error, type(out.exception).__name__, *direct])
print(json.dumps(found))
"""
    )
    odd, rude = result.json
    assert odd[:2] == rude[:2] == ["FAILED", "EXCEPTION"]
    assert "Odd" in odd[2]
    assert "the message" in odd[2]
    assert "Rude" in rude[2]
    assert (odd[3], rude[3]) == (odd[4], rude[4]) == ("RemoteExecutionError", "Rude")
    assert "the message" in odd[5]


def test_an_exception_larger_than_a_header_in_any_alphabet_comes_home(shared_daemon: Host) -> None:
    """Six JSON bytes a control character, four an emoji: what is shown is cut, the object is whole."""
    result = shared_daemon.run(
        HEAD
        + r"""
@remote(queue, max_retries=0)
def f(text): raise ValueError(text * 40_000)
@remote(direct)
def g(text): raise ValueError(text * 40_000)
found = []
for text in ("x", "\u6f22", "\U0001f600", "\x00", "\udc80"):
    out = f(text).result(timeout=20)
    try: g(text).result(timeout=20)
    except ValueError as error: direct = str(error)
    found.append([out.status, type(out.exception).__name__, str(out.exception) == text * 40_000, direct == text * 40_000])
print(json.dumps(found))
""",
    )
    assert result.json == [["FAILED", "ValueError", True, True]] * 5


def test_a_stored_error_in_any_alphabet_is_read_again_later(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + r"""
@remote(queue, max_retries=0)
def f(): raise ValueError("\x00" * 40_000)
out = f().result()
print(json.dumps([out.status, Job.from_id(out.id).result(timeout=20).status]))
"""
    )
    assert result.json == ["FAILED", "FAILED"]


def test_f18_results_of_every_size_around_the_inline_limit_arrive_whole(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(queue)
def f(x): return x
@remote(direct)
def g(x): return x
for size in (0, 1, 65_000, 65_535, 65_536, 65_537, 70_000, 1 << 20, 30 << 20):
    data = os.urandom(size)
    assert f(data).result().output == data, size
    assert g(data).result() == data, size
print("same")
"""
    )
    assert result.out.endswith("same\n")


def test_f18_a_result_of_two_gigabytes_arrives_whole(shared_daemon: Host) -> None:
    """It travels as a descriptor; neither the daemon nor a limit of 2^31 is in its way."""
    from tests.faults.rawclient import resident_bytes

    before = resident_bytes(shared_daemon)
    result = shared_daemon.run(
        HEAD
        + """
@remote(direct)
def f(size): return bytes(size)
value = f((2 << 30) + 1).result()
print(len(value), value[-1])
""",
        timeout=100,
    )
    assert result.out.split() == [str((2 << 30) + 1), "0"]
    assert resident_bytes(shared_daemon) - before < 64 << 20
