"""The client's thread that talks to the daemon is everybody's: what goes wrong with one call ends that call, by name, and no other."""

from __future__ import annotations

import json
import socket
from typing import Any

from remoted_client import wire
from remoted_client.attendant import Attendant
from remoted_client.lease import Lease
from tests.harness import Host, host

HEAD = """
import json, os, resource, signal, sys
from remoted_client import *
from remoted_client import remote
@remote(CpuLiveLoadBalancer(name="direct"))
def direct(x): return x
@remote(CpuLiveServerless(name="queue"))
def queue(x): return x
"""


def test_t44_direct_calls_that_are_refused_leave_all_others_at_work_and_go_again_when_there_is_room() -> None:
    """Of a lease that was refused three refusals arrive together: of its code, its surroundings and itself."""
    with host(f"[limits]\nfree_disk_reserve_bytes = {1 << 60}\n") as machine:
        there_is_room = machine.project / "room"
        process = machine.start().popen(
            HEAD
            + f"""
import time
kinds = []
for f in (direct, direct, queue, direct):
    try: f(1).result(timeout=30)
    except RemotedError as error: kinds.append(error.code)
print(json.dumps(kinds), flush=True)
while not os.path.exists({str(there_is_room)!r}): time.sleep(0.01)
print(json.dumps([direct(2).result(timeout=30), queue(3).result(timeout=30).unwrap()]))
"""
        )
        assert process.stdout is not None
        assert json.loads(process.stdout.readline()) == ["DISK_FULL"] * 4
        machine.terminate()
        machine.config.write_text("", encoding="utf-8")
        machine.start()
        there_is_room.touch()
        out, err = process.communicate(timeout=60)
    assert json.loads(out) == [2, 3]
    assert "Traceback" not in err


def test_a_callback_that_raises_harms_no_call(shared_daemon: Host) -> None:
    found = shared_daemon.run(
        HEAD
        + """
import threading
heard = threading.Event()
def callback(handle):
    heard.set()
    raise ValueError("of the callback")
for f in (queue, direct):
    heard.clear()
    f(1).add_done_callback(callback)
    assert heard.wait(30)
print(json.dumps([direct(2).result(timeout=30), queue(3).result(timeout=30).unwrap()]))
"""
    )
    assert found.json == [2, 3]
    assert found.err.count("ValueError: of the callback") == 2
    assert "a callback of add_done_callback has raised" in found.err


def test_a_process_without_descriptors_is_told_so_and_goes_on_when_it_has_some(shared_daemon: Host) -> None:
    found = shared_daemon.run(
        HEAD
        + """
assert queue(0).result(timeout=30).unwrap() == 0  # the line is there, a lease is not
taken = []
resource.setrlimit(resource.RLIMIT_NOFILE, (64, 64))
while True:
    try: taken.append(os.dup(2))
    except OSError: break
handle = direct(1)
try: handle.result(timeout=30)
except RemotedError as error: said = [type(error).__name__, str(error)]
for fd in taken: os.close(fd)
print(json.dumps([said, direct(2).result(timeout=30), queue(3).result(timeout=30).unwrap()]))
"""
    )
    said, *answers = found.json
    assert said[0] == "RemotedError"
    assert "Too many open files" in said[1]
    assert answers == [2, 3]


class Noting:
    """Whose lease it is."""

    def __init__(self) -> None:
        self.refusals: list[str] = []
        self.faults: list[Exception] = []

    def on_refused(self, lease: Lease, header: dict[str, Any]) -> None:
        self.refusals.append(header["code"])
        lease.close()

    def on_granted(self, lease: Lease, header: dict[str, Any]) -> None:
        raise KeyError(header["worker"])

    def on_fault(self, lease: Lease, error: Exception) -> None:
        self.faults.append(error)
        lease.close()


def read_once(owner: Noting, said: bytes) -> Lease:
    """A lease to which all that came together."""
    ours, theirs = socket.socketpair()
    lease = Lease(owner, "client", 0.0)  # type: ignore[arg-type]
    lease.open(ours, b"", b"")
    with theirs:
        theirs.sendall(said)
        lease.read_now()
    return lease


def test_after_a_refusal_that_ends_a_lease_no_other_is_heard() -> None:
    owner = Noting()
    lease = read_once(owner, b"".join(wire.encode({"op": "refused", "code": code}) for code in ("DISK_FULL", "MISSING_CONTENT")))
    assert owner.refusals == ["DISK_FULL"]
    lease.ask_again((), b"")  # whoever still has it in hand
    lease.read_now()


def test_what_cannot_be_handled_is_its_owners_to_end() -> None:
    owner = Noting()
    read_once(owner, wire.encode({"op": "grant", "worker": "w1"}))
    assert [repr(error) for error in owner.faults] == ["KeyError('w1')"]


def test_an_errand_that_fails_is_said_and_the_next_one_is_run(capsys: Any) -> None:
    attendant = Attendant()
    ours, theirs = socket.socketpair()
    done: list[str] = []

    def fail() -> None:
        raise ZeroDivisionError("of the errand")

    attendant.post(fail)
    attendant.post(lambda: done.append("errand"))
    attendant.after(0.0, fail)
    attendant.after(0.0, lambda: (done.append("timer"), theirs.close())[0])
    with ours, theirs:
        attendant.rounds(ours, lambda: False, lambda: False)
    assert done == ["errand", "timer"]
    assert capsys.readouterr().err.count("ZeroDivisionError: of the errand") == 2
