"""Fork servers of the system's daemon: a process of each user's bears workers that are as limited as any other."""

from __future__ import annotations

import json
import os
import signal
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.harness import wait_until
from tests.root.system_host import UNKNOWN, SystemHost, User, system_host

pytestmark = pytest.mark.root

HEAD = """
import json, os, sys
from remoted_client import *
from remoted_client import remote, CpuLiveServerless, PodTemplate
def groups(): return sorted(line.split(":", 2)[2] for line in open("/proc/self/cgroup").read().split() if "remoted-" in line)
"""
WHO = (
    HEAD
    + """
@remote(CpuLiveServerless(name=sys.argv[1], workersMax=1, template=PodTemplate(memory_gb=0.25)))
def who():
    status = dict(line.split(":", 1) for line in open("/proc/self/status") if ":" in line)
    return [os.getresuid(), os.getresgid(), sorted(os.getgroups()), int(status["CapEff"], 16), status["NoNewPrivs"].strip(), groups(), os.getpid()]
print(json.dumps(who().result().unwrap()))
"""
)


def workers(user: User) -> dict[str, Any]:
    document: dict[str, Any] = json.loads(user.remotectl("workers", "--json").out)
    return document


def worker_of(user: User, pool: str) -> dict[str, Any]:
    found: dict[str, Any] = next(worker for worker in workers(user)["workers"] if worker["pool"] == pool)
    return found


def test_t22_a_forked_worker_is_its_caller_in_a_group_of_its_own(house: SystemHost) -> None:
    alice = house.user("alice", 60001, 60010, (60005, 60006))
    one, two = alice.run(WHO, "one").json, alice.run(WHO, "two").json
    first, second = worker_of(alice, "one"), worker_of(alice, "two")
    [server] = [server for server in workers(alice)["fork_servers"] if server["id"] == first["fork_server"]]

    assert one[:5] == two[:5] == [[60001] * 3, [60010] * 3, [60005, 60006], 0, "1"]
    assert [first["start"], second["start"]] == ["forked", "forked"], first["start_reason"]
    assert second["fork_server"] == server["id"]
    assert one[5]
    assert {Path(group).name for group in one[5]} == {first["id"]}
    assert {Path(group).name for group in two[5]} == {second["id"]}
    assert psutil.Process(server["pid"]).uids().effective == 60001
    assert f"fork-{server['id']}" in Path(f"/proc/{server['pid']}/cgroup").read_text(encoding="ascii")


def test_t35_users_and_sets_of_groups_have_fork_servers_of_their_own(house: SystemHost, alice: User, bob: User) -> None:
    others = house.user("alice", 60001, groups=(60005,))
    for number, user in enumerate((alice, bob, others)):
        user.run(WHO, f"theirs-{number}")
    theirs = [worker for user in (alice, bob) for worker in workers(user)["workers"] if worker["pool"].startswith("theirs")]

    assert len({worker["fork_server"] for worker in theirs if worker["start"] == "forked"}) == 3, theirs
    assert not {server["id"] for server in workers(bob)["fork_servers"]} & {server["id"] for server in workers(alice)["fork_servers"]}


HOG = (
    HEAD
    + """
@remote(CpuLiveServerless(name="hog", workersMax=1, template=PodTemplate(memory_gb=0.25)), max_retries=0)
def hog(): return len(b"x" * (1 << 30))
@remote(CpuLiveServerless(name="beside", workersMax=1), max_retries=0)
def beside(): return 1
assert beside().result().unwrap() == 1
out = hog().result()
print(json.dumps([out.status, out.error, beside().result().unwrap()]))
"""
)


def test_f11_a_forked_worker_has_its_own_limit_of_memory(alice: User) -> None:
    status, error, beside = alice.run(HOG).json

    assert (status, beside) == ("FAILED", 1)
    assert "0.25 GiB" in error
    assert {server["state"] for server in workers(alice)["fork_servers"]} == {"ready"}


def test_the_end_of_a_fork_server_leaves_its_workers_and_their_groups_alone(alice: User) -> None:
    before = alice.run(WHO, "left").json
    worker = worker_of(alice, "left")
    [pid] = [server["pid"] for server in workers(alice)["fork_servers"] if server["id"] == worker["fork_server"]]
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: worker["fork_server"] not in {server["id"] for server in workers(alice)["fork_servers"]}, 20)

    assert alice.run(WHO, "left").json == before
    assert not list(Path("/sys/fs/cgroup").glob(f"**/fork-{worker['fork_server']}"))


HOSTILE = """
import os, socket
import remoted_worker.forkserver as forkserver
from remoted_client import wire
Server = forkserver.ForkServer
def introduce(self, token):
    "Somebody who is in no group of the server's comes in the place of a worker: whoever listens outside."
    own = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    own.connect(f"/proc/self/fd/{self._door}")
    outside = socket.socket(socket.AF_UNIX); outside.connect(os.environ["OUTSIDE"])
    socket.send_fds(outside, [token.encode()], [own.fileno(), self._door])
    outside.recv(1)
    os._exit(0)
Server._introduce = introduce
"""
OUTSIDE = """
import os, socket, sys
sys.path.insert(0, sys.argv[2])
from remoted_client import wire
listener = socket.socket(socket.AF_UNIX); listener.bind(sys.argv[1]); listener.listen()
print("listening", flush=True)
peer, _ = listener.accept()
token, fds, _, _ = socket.recv_fds(peer, 1000, 2)
sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET); sock.connect(f"/proc/self/fd/{fds[1]}")
wire.send(sock, wire.encode({"op": "born", "token": token.decode()}))
print("taken in" if sock.recv(1000) else "sent away", flush=True)
"""


def test_t34_a_process_outside_of_the_servers_group_is_not_taken_in(house: SystemHost, alice: User) -> None:
    """The same user's, and it has the token and the key: it is no grandchild of the server."""
    folder = alice.home / "site-packages"
    folder.mkdir()
    (folder / "comes_from_outside.py").write_text(HOSTILE, encoding="utf-8")
    rendezvous = str(alice.home / "outside.sock")
    outside = alice.popen_command([str(house.python), "-c", OUTSIDE, rendezvous, str(house.library)])
    assert outside.stdout is not None
    assert outside.stdout.readline() == "listening\n"
    path = os.pathsep.join([alice.environ.get("PYTHONPATH", ""), str(folder)])
    result = alice.run(
        HEAD + '@remote(CpuLiveServerless(name="outside", workersMax=1, preload="comes_from_outside"), env={"OUTSIDE": sys.argv[1]})\ndef f(): return os.getuid()\nprint(json.dumps(f().result().unwrap()))',
        rendezvous,
        PYTHONPATH=path,
    )

    assert result.json == 60001
    assert outside.communicate(timeout=30)[0] == "sent away\n"
    assert worker_of(alice, "outside")["start"] == "plain"
    assert "has not borne" in worker_of(alice, "outside")["start_reason"]


def test_one_user_has_so_many_fork_servers_and_no_more() -> None:
    with system_host(UNKNOWN + "[limits]\nfork_servers_per_uid = 1\n") as host:
        alice, bob = host.start().user("alice", 60001), host.user("bob", 60002)
        bob.run(WHO, "bobs")
        kept = workers(bob)["fork_servers"][0]["id"]
        for zone in ("Europe/Rome", "Asia/Tokyo"):
            alice.run(WHO, "alices-" + zone[:4].lower(), TZ=zone)

        assert len(workers(alice)["fork_servers"]) == 1
        assert [server["id"] for server in workers(bob)["fork_servers"]] == [kept]
