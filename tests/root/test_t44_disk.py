"""T44: what one user fills of the daemon's disk is refused or cut off by name, and is nobody else's trouble."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.harness import wait_until
from tests.root.system_host import UNKNOWN, SystemHost, User, system_host

pytestmark = pytest.mark.root

QUOTA = 3 << 20
CONFIG = f"{UNKNOWN}[limits]\nstored_bytes_per_uid = {QUOTA}\nfree_disk_reserve_bytes = 1048576\n"
HEAD = """
import json, os, sys, time
from remoted_client import remote, CpuLiveServerless, CpuLiveLoadBalancer, Job, RemotedError
queue = CpuLiveServerless(name="queue", workersMax=1)
@remote(queue, max_retries=2)
def give(size): return os.urandom(size)
@remote(queue, max_retries=0)
def speak(lines, gate="/"):
    for number in range(lines): print(number, "x" * 999)
    while not os.path.exists(gate): time.sleep(0.01)
    return "done"
def short(out): return [out.status, out.state_reason, out.error, out.attempts]
"""
WORKS = HEAD + "out = speak(20).result(); print(json.dumps([out.status, len(give(100_000).result().unwrap()), out.stdout.count('\\n')]))"


@pytest.fixture(scope="module")
def house() -> Iterator[SystemHost]:
    with system_host(CONFIG) as made:
        yield made.start()


@pytest.fixture(autouse=True)
def others_are_served(bob: User) -> Iterator[None]:
    """After each of these bob can call, print and get results."""
    yield
    assert bob.run(WORKS).json == ["COMPLETED", 100_000, 20]


def _filler(house: SystemHost, number: int) -> User:
    """Each fills an account of his own."""
    return house.user(f"filler{number}", 61000 + number)


def test_t44_a_result_beyond_the_users_quota_is_lost_by_name(house: SystemHost) -> None:
    status, reason, error, attempts = _filler(house, 1).run(HEAD + f"print(json.dumps(short(give({2 * QUOTA}).result())))").json

    assert (status, reason, attempts) == ("FAILED", "RESULT_LOST", 1)
    assert f"your limit stored_bytes_per_uid is {QUOTA}" in error


def test_t44_output_beyond_the_users_quota_is_cut_off_with_a_mark_and_a_count(house: SystemHost) -> None:
    """Looked at while the job runs: once it has ended it is the oldest, and of who is near his limit that goes."""
    alice = _filler(house, 2)
    gate = alice.home / "gate"
    program = HEAD + f"out = speak(10_000, {str(gate)!r}).result(); print(json.dumps([out.output, out.stderr]))"
    with ThreadPoolExecutor(1) as beside:
        ended = beside.submit(alice.run, program)
        wait_until(lambda: [b"from here on output is not kept" in log.read_bytes() for log in _logs(house, alice)] == [True], 20)
        [log] = _logs(house, alice)
        assert log.stat().st_size <= QUOTA
        gate.touch()
        output, stderr = ended.result().json

    assert output == "done"
    assert f"stored_bytes_per_uid is {QUOTA}" in stderr
    assert "bytes of output were not kept]" in stderr


def _logs(house: SystemHost, user: User) -> list[Path]:
    return [path for path in (house.state / "logs").glob("*.log") if path.stat().st_uid == user.uid]


@pytest.mark.parametrize("size", [1000, 100_000])
def test_t44_a_stream_beyond_the_users_quota_is_stopped_by_name(house: SystemHost, size: int) -> None:
    """Small items are rows, large ones files; without an end of its own, and with nobody who reads along."""
    program = f"""
@remote(queue, max_retries=0)
def stream():
    while True: yield os.urandom({size})
print(json.dumps(short(Job.from_id(stream.options(detach=True)().id).result())))
"""
    status, reason, error, _ = _filler(house, 3 + (size > 1000)).run(HEAD + program).json

    assert (status, reason) == ("FAILED", "RESULT_LOST")
    assert "stored_bytes_per_uid" in error


def test_t44_arguments_beyond_the_users_quota_are_refused_by_name(house: SystemHost) -> None:
    program = f"""
@remote(queue)
def take(data): return len(data)
refused = []
for size in ({2 * QUOTA}, 30_000):
    for number in range(200):
        try: take.options(detach=True)(os.urandom(size)).id
        except RemotedError as error:
            refused.append([type(error).__name__, str(error)])
            break
print(json.dumps(refused))
"""
    large, many = _filler(house, 5).run(HEAD + program).json

    for kind, text in (large, many):
        assert kind == "QuotaExceeded"
        assert "stored_bytes_per_uid" in text


def test_t44_who_is_near_the_quota_loses_the_oldest_results_first(house: SystemHost) -> None:
    """What is old makes room for what is new, and content that can be sent again goes before results."""
    program = """
ids = []
while len(ids) < 60:
    try:
        out = give(100_000)
        problem = out.result().error
    except RemotedError as error: problem = str(error)
    if not problem: ids.append(out.id)
    else: assert "stored_bytes_per_uid" in problem, problem
def there(id):
    try: return len(Job.from_id(id).result().unwrap()) == 100_000
    except RemotedError: return False
print(json.dumps([there(ids[0]), there(ids[-1])]))
"""
    assert _filler(house, 6).run(HEAD + program).json == [False, True]


def test_t44_on_a_small_disk_nobody_has_more_than_he_leaves_free_for_others() -> None:
    with system_host(UNKNOWN + "[limits]\nfree_disk_reserve_bytes = 4194304\n") as house:
        house.state.mkdir(mode=0o711)
        mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=40m,mode=711", "remoted-test", str(house.state)], check=False, capture_output=True)
        if mounted.returncode:
            pytest.skip("needs CAP_SYS_ADMIN to mount a tmpfs")
        try:
            house.start()
            program = """
outs = [give(2 << 20).result() for _ in range(30)]
print(json.dumps([short(out) for out in outs if out.status != "COMPLETED"][:1]))
"""
            [[status, reason, error, _]] = house.user("alice", 60001).run(HEAD + program).json
            assert (status, reason) == ("FAILED", "RESULT_LOST")
            assert "left free for everybody else" in error
            assert house.user("bob", 60002).run(WORKS).json == ["COMPLETED", 100_000, 20]
        finally:
            house.stop()
            subprocess.run(["umount", "-l", str(house.state)], check=True)


_FILL = """
def fill(name, size):
    for entry in os.listdir("/proc/self/fd"):
        try: path = os.readlink("/proc/self/fd/" + entry)
        except OSError: continue
        if path.endswith("." + name):
            for _ in range(size >> 20): os.write(int(entry), b"x" * (1 << 20))
@remote(queue, max_retries=0)
def misuse(name, size, begun, go):
    open(begun, "w").close()
    while not os.path.exists(go): time.sleep(0.02)
    fill(name, size)
    open(go + ".filled", "w").close()
    time.sleep(600)
"""


@pytest.mark.parametrize("name", ["outcomes", "output", "begun"])
def test_t44_who_writes_into_what_is_for_when_no_daemon_is_there_is_ended_by_name(house: SystemHost, name: str) -> None:
    program = _FILL + f"open('go', 'w').close(); print(json.dumps(short(misuse({name!r}, 8 << 20, os.path.abspath('begun'), os.path.abspath('go')).result())))"
    status, reason, error, _ = _filler(house, 10).run("import time\n" + HEAD + program).json

    assert (status, reason) == ("FAILED", "WORKER_DIED")
    assert "wrote into the files in which workers leave their outcomes" in error
    wait_until(lambda: all(path.stat().st_blocks < 2048 for path in (house.state / "outcomes").glob("w*")), 10)


@pytest.mark.parametrize(("name", "size"), [("outcomes", 2 * QUOTA), ("output", 100 << 20)])
def test_t44_what_was_filled_while_no_daemon_was_there_is_thrown_away_by_the_next(name: str, size: int) -> None:
    with system_host(CONFIG) as house:
        alice = house.start().user("alice", 60001)
        begun, go = alice.home / "begun", alice.home / "go"
        program = "import time\n" + HEAD + _FILL + f"print(json.dumps(misuse.options(detach=True)({name!r}, {size}, {str(begun)!r}, {str(go)!r}).id))"
        job = alice.run(program).json
        wait_until(begun.exists, 20)
        assert house.process is not None
        house.process.terminate()
        house.process.wait(20)
        go.touch()
        wait_until(alice.home.joinpath("go.filled").exists, 20)
        house.start()

        status, reason, error, _ = alice.run(HEAD + f"print(json.dumps(short(Job.from_id({job!r}).result())))").json
        assert (status, reason) == ("FAILED", "RESULT_LOST")
        assert "than its user may store" in error
        wait_until(lambda: not list((house.state / "outcomes").glob("w*.outp*")) or max(path.stat().st_blocks for path in (house.state / "outcomes").glob("w*")) < 2048, 10)
        assert house.user("bob", 60002).run(WORKS).json[0] == "COMPLETED"
