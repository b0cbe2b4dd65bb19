"""The system's daemon, real users and a real card: what the fake driver cannot know.

Runs as root where the driver and an interpreter with PyTorch are (``REMOTED_TEST_TORCH=/path/to/python``); nobody else may
use the card meanwhile. No setting of the card is changed.
"""

from __future__ import annotations

import json
import os
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import wait_until
from tests.root.system_host import UNKNOWN, SystemHost, User, system_host

TORCH = os.environ.get("REMOTED_TEST_TORCH", "")
pytestmark = pytest.mark.skipif(
    not TORCH or not Path("/dev/nvidiactl").exists() or os.geteuid() != 0,
    reason="needs root, a card of NVIDIA's and REMOTED_TEST_TORCH, which names a Python with PyTorch: nothing here has run on a card",
)

GIB = 1 << 30
HEAD = """
import json, os, sys, time
from pathlib import Path
from remoted_client import *
from remoted_client import remote, LiveServerless, LiveLoadBalancer, CpuLiveServerless
gpu = LiveServerless(name="gpu", workersMax=1, idleTimeout=600)
direct = LiveLoadBalancer(name="direct", workersMax=1, idleTimeout=600)
warm = LiveLoadBalancer(name="warm", workersMax=1, idleTimeout=600, preload=["torch"])
cpu = CpuLiveServerless(name="cpu")
def look():
    import ctypes, subprocess
    code = ctypes.CDLL("libcuda.so.1").cuInit(0)
    smi = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.strip()
    return [code, smi, os.environ.get("CUDA_VISIBLE_DEVICES")]
def multiply(n=4096):
    import torch
    x = torch.ones(n, n, device="cuda")
    return [float((x @ x)[0, 0].item()), torch.cuda.mem_get_info()[0], os.getpid()]
def take(bytes_):
    import torch
    globals()["kept"] = torch.empty(bytes_, dtype=torch.uint8, device="cuda")
    return [os.getpid(), torch.cuda.mem_get_info()[0]]
def spin(path):
    import torch
    x = torch.randn(8192, 8192, device="cuda"); torch.empty(30 << 30, dtype=torch.uint8, device="cuda")
    Path(path).touch()
    while True: x = torch.tanh(x @ x)
"""


@pytest.fixture(scope="module")
def host() -> Iterator[SystemHost]:
    with system_host(f"{UNKNOWN}\n[gpu]\npoll_seconds = 0.5\n") as made:
        yield made.start()


@pytest.fixture
def alice(host: SystemHost) -> User:
    return person(host, "alice", 60001)


@pytest.fixture
def bob(host: SystemHost) -> User:
    return person(host, "bob", 60002)


def person(on: SystemHost, name: str, uid: int) -> User:
    """PyTorch's warnings are none of our errors."""
    return on.user(name, uid, PYTHONWARNINGS="default")


def run(user: User, script: str, *arguments: str) -> Any:
    return user.run(HEAD + script, *arguments, python=TORCH).json


def told(name: str, value: object) -> None:
    """A figure for the reader of ``pytest -s``."""
    print(f"\n# {name}: {value}", flush=True)


def cards(user: User) -> list[dict[str, Any]]:
    shown: dict[str, Any] = json.loads(user.remotectl("gpus", "--json").out)
    told("gpus", json.dumps(shown)[:700])
    return list(shown["gpus"])


def test_t48_a_stranger_on_the_card_is_seen_waited_for_and_left_alone() -> None:
    """Somebody computes outside of the daemon: the job says why it waits, and begins when the stranger has gone.

    The first of the tests, because the others' idle worker would be a stranger to this one's daemon.
    """
    program = "import torch, sys; x = torch.empty(5 << 30, dtype=torch.uint8, device='cuda'); print('holds', flush=True); sys.stdin.read()"
    script = """
job = remote(gpu)(multiply)(); end = time.time() + 20
while job.state_reason() != "FOREIGN_GPU_USE" and time.time() < end: time.sleep(0.05)
print(job.state_reason(), flush=True); print(json.dumps(job.result().unwrap()))
"""
    with system_host(f"{UNKNOWN}\n[gpu]\npoll_seconds = 0.5\n") as host:
        alice = person(host.start(), "alice", 60001)
        stranger = subprocess.Popen([TORCH, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        try:
            assert stranger.stdout is not None
            stranger.stdout.readline()
            began = time.perf_counter()
            wait_until(lambda: str(stranger.pid) in json.dumps(cards(alice)), 10, lambda: f"{cards(alice)}")
            told("a stranger is seen after", time.perf_counter() - began)
            waiting = alice.popen(HEAD + script, python=TORCH)
            assert waiting.stdout is not None
            reason = waiting.stdout.readline().strip()
            assert stranger.poll() is None
        finally:
            stranger.kill()
            stranger.communicate()
        out, err = waiting.communicate(timeout=60)

    assert reason == "FOREIGN_GPU_USE", err
    assert json.loads(out)[0] == 4096.0


def test_c07_the_card_is_seen_and_nobodys(alice: User) -> None:
    (card,) = cards(alice)
    told("doctor", alice.remotectl("doctor", check=False).out)
    told("status", alice.remotectl("status").out)

    assert card["uuid"].startswith("GPU-")


def test_c07_a_function_computes_on_the_card_that_is_lent_to_it(alice: User) -> None:
    script = """
began = time.perf_counter(); first = remote(gpu)(multiply)().result().unwrap(); cold = time.perf_counter() - began
began = time.perf_counter(); second = remote(gpu)(multiply)().result().unwrap()
print(json.dumps([first, second, cold, time.perf_counter() - began]))
"""
    first, second, cold, warm = run(alice, script)
    told("first call, and warm", (cold, warm))

    assert first[0] == second[0] == 4096.0
    assert first[2] == second[2]


def test_t47_a_worker_without_a_lease_finds_no_card(alice: User) -> None:
    """The kernel says so, whatever the variable says; the driver then knows of no device (CUDA_ERROR_NO_DEVICE is 100)."""
    with_card, without = run(alice, "print(json.dumps([remote(gpu)(look)().result().unwrap(), remote(cpu)(look)().result().unwrap()]))")
    told("with and without", (with_card, without))

    assert with_card[0] == 0
    assert "GPU-" in with_card[1]
    assert without[0] == 100
    assert "GPU-" not in without[1]


def test_c07_an_idle_worker_gives_the_card_and_its_memory_to_the_next_user(alice: User, bob: User) -> None:
    total = 60 * GIB
    pid, free = run(alice, "print(json.dumps(remote(gpu)(take)(60 << 30).result().unwrap()))")
    began = time.perf_counter()
    _, free_for_bob = run(bob, "print(json.dumps(remote(gpu)(take)(1 << 30).result().unwrap()))")
    told("from one user to the next, with the import of PyTorch", time.perf_counter() - began)

    assert free < 25 * GIB
    assert free_for_bob > total
    assert not Path(f"/proc/{pid}").exists()


def test_promise_4_a_cancelled_kernel_has_left_the_card_before_it_is_lent_again(alice: User, bob: User) -> None:
    """Also when it never returns to Python."""
    busy = alice.popen(HEAD + "job = remote(gpu)(spin)(sys.argv[1]); print(job.id, flush=True); job.result()", str(alice.home / "began"), python=TORCH)
    assert busy.stdout is not None
    job = busy.stdout.readline().strip()
    wait_until((alice.home / "began").exists, 60, lambda: "the body does not begin")
    began = time.perf_counter()
    told("cancel", alice.remotectl("cancel", job, check=False))
    value, free, _ = run(bob, "print(json.dumps(remote(gpu)(multiply)().result().unwrap()))")
    told("cancelled, and the next user's first call", time.perf_counter() - began)
    busy.communicate(timeout=30)

    assert value == 4096.0
    assert free > 75 * GIB


def test_f26_too_much_memory_is_pytorchs_own_error_and_the_worker_goes_on(alice: User) -> None:
    script = """
import torch
try: remote(gpu)(take)(200 << 30).result().unwrap()
except Exception as error: found = [type(error).__mro__[1].__name__, type(error).__name__, str(error)[:80]]
print(json.dumps([found, remote(gpu)(multiply)().result().unwrap()[0]]))
"""
    found, value = run(alice, script)
    told("out of memory", found)

    assert "OutOfMemoryError" in str(found)
    assert value == 4096.0


def test_f30_a_fork_server_that_has_imported_pytorch_gives_birth_to_workers_that_compute(alice: User, bob: User) -> None:
    script = """
f = remote(warm)(multiply)
found = []
for _ in range(4):
    began = time.perf_counter(); value = f(1024)
    value = value.result() if hasattr(value, "result") else value
    found.append([time.perf_counter() - began, value[2]])
latencies = []
g = remote(warm)(lambda: 1)
g().result()
for _ in range(300):
    began = time.perf_counter(); g().result(); latencies.append(time.perf_counter() - began)
print(json.dumps([found, sorted(latencies)[150]]))
"""
    first = run(alice, script)
    again = run(bob, script)
    third = run(alice, script)
    told("preloaded: of one user, of another, and of the first again", (first, again, third))

    assert len({pid for _, pid in first[0]}) == 1


def test_f12_tensors_on_the_card_come_back(alice: User) -> None:
    """A tensor on the card in a result is a tensor on the card in the caller's process."""
    script = """
def make():
    import torch
    return torch.arange(10, device="cuda"), torch.arange(10)
import torch
try:
    there, here = remote(direct)(make)().result()
    print(json.dumps([str(there.device), there.sum().item(), str(here.device), here.sum().item()]))
except Exception as error: print(json.dumps([type(error).__name__, str(error)[:400]]))
"""
    found = run(alice, script)
    told("tensors", found)

    assert found == ["cuda:0", 45, "cpu", 45]


def test_c04_three_users_share_one_card_in_turns(host: SystemHost) -> None:
    """Each has always a call of half a second waiting; after half a minute each has had about a third of the card."""
    script = """
def work():
    import torch
    end = time.perf_counter() + 0.5; x = torch.randn(2048, 2048, device="cuda"); n = 0
    while time.perf_counter() < end: x = torch.tanh(x @ x); torch.cuda.synchronize(); n += 1
    return n
f = remote(gpu)(work); end = time.time() + float(sys.argv[1]); spans = []
while time.time() < end:
    began = time.time(); f().result().unwrap(); spans.append([began, time.time()])
print(json.dumps(spans))
"""
    users = [person(host, f"user{n}", 60010 + n) for n in range(3)]
    running = [user.popen(HEAD + script, "40", python=TORCH) for user in users]
    spans = []
    for process in running:
        out, err = process.communicate(timeout=110)
        assert process.returncode == 0, f"{err}\n{host.log()[-2000:]}"
        spans.append(json.loads(out))
    counts = [len(each) for each in spans]
    waits = sorted(end - begin - 0.5 for each in spans for begin, end in each)
    told("calls of three users, Jain's index, median wait, p95", (counts, sum(counts) ** 2 / (3 * sum(n * n for n in counts)), waits[len(waits) // 2], waits[int(len(waits) * 0.95)]))

    assert all(counts)

