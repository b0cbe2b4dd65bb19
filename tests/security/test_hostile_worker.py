"""A worker is as hostile as a client: user code that speaks on the worker's own channel (T34, T56; boundary b3)."""

from __future__ import annotations

import pytest

from tests.faults.rawclient import descriptors, resident_bytes
from tests.harness import Host, wait_until

HEAD = """
import array, json, os, socket, struct, sys, time
from remoted_client import *
from remoted_client import remote, context, wire, CpuLiveServerless, Job
victim, attacker = CpuLiveServerless(name="victim", workersMax=1), CpuLiveServerless(name="attacker", workersMax=1)

def channel():
    "The daemon's line of this worker: the only SEQPACKET socket here."
    for name in os.listdir("/proc/self/fd"):
        try: is_socket = os.readlink(f"/proc/self/fd/{name}").startswith("socket:")
        except FileNotFoundError: continue  # the folder's own descriptor
        if not is_socket: continue
        sock = socket.socket(fileno=os.dup(int(name)))
        if sock.type == socket.SOCK_SEQPACKET and sock.family == socket.AF_UNIX: return sock
        sock.close()

def say(header, body=b"", fds=()):
    sock = channel()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([wire.encode(header, body, len(fds))], rights)
    sock.close()

def say_bytes(data):
    sock = channel()
    try: sock.send(data)
    finally: sock.close()

DONE = {"op": "done", "kind": "returned", "error_type": "", "message": "", "traceback": "", "exit_code": None, "size": 5}
"""


def test_t34_the_attempt_of_another_worker_cannot_be_answered(shared_daemon: Host) -> None:
    token = shared_daemon.project / "token"
    result = shared_daemon.run(
        HEAD
        + f"""
@remote(victim, max_retries=0)
def honest(path):
    open(path, "w").write(context.running_call().attempt)
    while not os.path.exists(path + ".go"): time.sleep(0.01)
    return "the truth"
@remote(attacker, max_retries=0)
def lie(path):
    while not (os.path.exists(path) and open(path).read()): time.sleep(0.01)
    other = open(path).read()
    for op in ("done", "item"):
        say({{**DONE, "op": op, "attempt": other, "number": 0}}, b"a lie")
    open(path + ".go", "w").close()
    return "lied"
truth = honest({str(token)!r})
lied = lie({str(token)!r}).result()
out = truth.result()
print(json.dumps([lied.output, out.status, out.output]))
"""
    )
    assert result.json == ["lied", "COMPLETED", "the truth"]


def test_t56_an_old_attempts_token_is_worth_nothing(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + f"""
@remote(attacker, max_retries=1)
def f(path):
    attempt = context.running_call().attempt
    if not os.path.exists(path):
        open(path, "w").write(attempt)
        raise ValueError("the first attempt fails")
    say({{**DONE, "attempt": open(path).read()}}, b"late and false")
    time.sleep(0.2)
    return "the second attempt"
out = f({str(shared_daemon.project / "first")!r}).result()
print(json.dumps([out.status, out.output, out.attempts]))
"""
    )
    assert result.json == ["COMPLETED", "the second attempt", 2]


HARMLESS = {
    "unknown-op": 'say({"op": "give_me_root", "attempt": context.running_call().attempt})',
    "no-op": "say({})",
    "second-hello": 'say({"op": "hello", "protocol": 1, "pid": 1, "python": [3], "cloudpickle": "x"})',
    "descriptors": 'nothing = os.memfd_create("nothing")\n    for _ in range(200): say({"op": "nothing"}, fds=(nothing,) * 4)',
    "unknown-attempt": 'nothing = os.memfd_create("nothing")\n    for _ in range(200): say({**DONE, "attempt": "0" * 32}, fds=(nothing,))',
}


@pytest.mark.parametrize("how", HARMLESS)
def test_t34_what_means_nothing_is_dropped(shared_daemon: Host, how: str) -> None:
    shared_daemon.run(HEAD + "@remote(attacker)\ndef f(): pass\nf().result()")
    before = descriptors(shared_daemon)
    result = shared_daemon.run(
        HEAD
        + f"""
@remote(attacker, max_retries=0)
def f():
    {HARMLESS[how]}
    return 1
out = f().result()
print(json.dumps([out.status, out.output]))
"""
    )
    assert result.json == ["COMPLETED", 1]
    wait_until(lambda: descriptors(shared_daemon) <= before + 2, 5, lambda: f"{descriptors(shared_daemon)} > {before}")


BROKEN = {
    **{f"passes-{name}": f'say({{**DONE, "attempt": context.running_call().attempt}}, fds=({fd},))' for name, fd in (("a-device", 'os.open("/dev/zero", 0)'), ("a-pipe", "os.pipe()[0]"), ("a-folder", 'os.open("/", 0)'), ("tcp", "socket.socket().detach()"))},
    "garbage": "say_bytes(os.urandom(5000))",
    "short": 'say_bytes(b"R")',
    "empty": 'say_bytes(b"")',
    "length-4g": 'say_bytes(struct.pack("!2sBBII", b"RM", 1, 0, 0xFFFFFFFF, 0))',
    "body-4g": 'say_bytes(struct.pack("!2sBBII", b"RM", 1, 0, 2, 0xFFFFFFFF) + b"{}")',
    "lengths-disagree": 'say_bytes(struct.pack("!2sBBII", b"RM", 1, 0, 2, 0) + b"{}and more")',
    "missing-descriptors": 'say_bytes(struct.pack("!2sBBII", b"RM", 1, 2, 2, 0) + b"{}")',
    "no-json": 'say_bytes(struct.pack("!2sBBII", b"RM", 1, 0, 4, 0) + b"nope")',
    "done-without-fields": 'say({"op": "done", "attempt": context.running_call().attempt, "kind": "raised"})',
    "item-without-number": 'say({"op": "item", "attempt": context.running_call().attempt, "number": "x"}, b"x")',
}


@pytest.mark.parametrize("how", BROKEN)
def test_t34_a_worker_that_breaks_the_protocol_loses_its_life_and_nobody_else(shared_daemon: Host, how: str) -> None:
    before = resident_bytes(shared_daemon)
    result = shared_daemon.run(
        HEAD
        + f"""
@remote(victim)
def bystander():
    time.sleep(0.5)
    return "unharmed"
@remote(attacker, max_retries=0)
def f():
    {BROKEN[how]}
    time.sleep(60)
@remote(attacker)
def after(): return "served"
other = bystander()
out = f().result(timeout=30)
print(json.dumps([out.status, out.state_reason, other.result().output, after().result().output]))
"""
    )
    assert result.json == ["FAILED", "WORKER_DIED", "unharmed", "served"]
    assert resident_bytes(shared_daemon) - before < 24 << 20


def test_t34_a_result_that_is_larger_than_any_disk_is_a_failed_job(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(attacker, max_retries=0)
def f():
    fd = os.memfd_create("sparse")
    os.ftruncate(fd, 1 << 50)
    say({**DONE, "attempt": context.running_call().attempt}, fds=(fd,))
    time.sleep(1)
out = f().result(timeout=20)
print(json.dumps([out.status, out.state_reason, out.error]))
"""
    )
    status, reason, error = result.json
    assert (status, reason) == ("FAILED", "RESULT_LOST")
    assert error


def test_t34_items_out_of_order_and_a_flood_of_words_are_ignored(shared_daemon: Host) -> None:
    before = resident_bytes(shared_daemon)
    result = shared_daemon.run(
        HEAD
        + """
@remote(attacker, max_retries=0)
def f():
    attempt = context.running_call().attempt
    for n in range(2000): say({"op": "item", "attempt": attempt, "number": 5 + n}, bytes(60_000))
    for n in range(2000): say({"op": "x" * 50_000})
    return 1
out = f().result(timeout=40)
print(json.dumps([out.status, out.output]))
"""
    )
    assert result.json == ["COMPLETED", 1]
    assert resident_bytes(shared_daemon) - before < 24 << 20


def test_t34_a_kind_that_does_not_exist_is_no_success(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(attacker, max_retries=0)
def f():
    say({**DONE, "attempt": context.running_call().attempt, "kind": "splendid"}, b"")
    time.sleep(0.3)
out = f().result(timeout=40)
print(json.dumps([out.status, out.output]))
"""
    )
    assert result.json == ["FAILED", None]


def test_t34_control_characters_and_half_surrogates_in_what_a_worker_says_are_stored_and_shown(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + r"""
@remote(attacker, max_retries=0)
def f():
    say({**DONE, "kind": "raised", "attempt": context.running_call().attempt, "message": "\udc80\x00\x1b[31m", "error_type": "\ud800", "traceback": "\udfff"}, b"")
    time.sleep(0.3)
out = f().result(timeout=40)
print(json.dumps([out.status, Job.from_id(out.id).result().status]))
"""
    )
    assert result.json == ["FAILED", "FAILED"]


def test_t34_items_that_nobody_can_store_so_fast_end_their_worker_and_fill_no_memory(shared_daemon: Host) -> None:
    """The daemon's loop and the store's line are everybody's."""
    before = resident_bytes(shared_daemon)
    result = shared_daemon.run(
        HEAD
        + """
@remote(attacker, max_retries=0)
def f():
    attempt = context.running_call().attempt
    sock, data = channel(), bytes(60_000)
    for n in range(10_000): sock.send(wire.encode({"op": "item", "attempt": attempt, "number": n}, data))
    time.sleep(60)
out = f().result(timeout=40)
print(json.dumps([out.status, out.state_reason, out.error]))
"""
    )
    status, reason, error = result.json
    assert (status, reason) == ("FAILED", "WORKER_DIED")
    assert "are not stored yet" in error
    assert resident_bytes(shared_daemon) - before < 48 << 20


def test_t34_a_stream_without_end_keeps_its_items_on_the_disk(shared_daemon: Host) -> None:
    """Those of a live call that are rows lie in memory, so there are not many."""
    before = resident_bytes(shared_daemon)
    result = shared_daemon.run(
        HEAD
        + """
@remote(attacker, max_retries=0)
def f():
    for n in range(1500): yield bytes([n % 256]) * 60_000
print(sum(len(item) == 60_000 for item in f()))
"""
    )
    assert result.json == 1500
    assert resident_bytes(shared_daemon) - before < 48 << 20


@pytest.mark.parametrize("field", ['"number": 1e999', '"number": []'])
def test_t34_a_number_that_is_none_ends_its_worker_without_a_line_in_the_log(shared_daemon: Host, field: str) -> None:
    descriptors_before, tracebacks = descriptors(shared_daemon), shared_daemon.log().count("Traceback")
    result = shared_daemon.run(
        HEAD
        + f"""
@remote(attacker, max_retries=0)
def f(field):
    head = ('{{"op": "item", "attempt": "%s", %s}}' % (context.running_call().attempt, field)).encode()
    fd = os.memfd_create("item")
    with channel() as sock: sock.sendmsg([struct.pack("!2sBBII", b"RM", wire.PROTOCOL, 1, len(head), 0) + head], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", [fd]))])
    time.sleep(60)
out = f({field!r}).result(timeout=40)
print(json.dumps([out.status, out.state_reason]))
"""
    )
    assert result.json == ["FAILED", "WORKER_DIED"]
    assert shared_daemon.log().count("Traceback") == tracebacks
    wait_until(lambda: descriptors(shared_daemon) <= descriptors_before, 20)
