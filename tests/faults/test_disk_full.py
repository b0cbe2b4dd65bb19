"""No room left: nothing is acknowledged that is not stored, and the daemon goes on when there is room again (T44)."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.harness import Host, host

HEAD = """
import json, os, sys, time
from remoted_client import *
from remoted_client import remote, CpuLiveServerless, CpuLiveLoadBalancer, Job
queue = CpuLiveServerless(name="queue", workersMax=1)
"""


def test_t44_content_that_would_eat_into_the_reserve_is_refused_by_name(bare_host: Host) -> None:
    bare_host.config.write_text(f"[limits]\nfree_disk_reserve_bytes = {1 << 60}\n", encoding="utf-8")
    result = bare_host.start().run(
        HEAD
        + """
@remote(queue)
def f(x): return len(x)
try: f(bytes(1 << 20)).result()
except SubmissionRefused as error: print(json.dumps([error.code, str(error)]))
"""
    )
    code, message = result.json
    assert code == "DISK_FULL"
    assert "free some space" in message


@contextlib.contextmanager
def small_disk(size: str) -> Iterator[tuple[Host, Path]]:
    """A host whose state is on a file system of its own."""
    with host("[limits]\nfree_disk_reserve_bytes = 0\nretry_cap_seconds = 1\n") as made:
        subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "remoted-test", str(made.state)], check=True)
        try:
            yield made.start(), made.state
        finally:
            made.stop()
            subprocess.run(["umount", "-l", str(made.state)], check=True)


@pytest.fixture
def may_mount(tmp_path: Path) -> None:
    done = subprocess.run(["mount", "-t", "tmpfs", "remoted-probe", str(tmp_path)], capture_output=True, check=False)
    if done.returncode != 0:
        pytest.skip("needs root with CAP_SYS_ADMIN to mount a tmpfs")
    subprocess.run(["umount", str(tmp_path)], check=True)


@pytest.mark.root
@pytest.mark.usefixtures("may_mount")
def test_t44_a_full_disk_refuses_submissions_and_keeps_what_it_acknowledged() -> None:
    with small_disk("3m") as (machine, state):
        result = machine.run(
            HEAD
            + f"""
marks = {str(machine.project / "marks")!r}
@remote(queue, max_retries=0)
def f(n, data):
    while not os.path.exists(marks): time.sleep(0.01)
    return n
taken, refused = [], []
for n in range(200):
    try: taken.append([n, f.options(detach=True)(n, os.urandom(40_000)).id])
    except RemotedError as error: refused.append([type(error).__name__, getattr(error, "code", ""), str(error)])
print(json.dumps([taken, refused]))
"""
        )
        taken, refused = result.json
        assert taken
        assert refused
        assert {kind for kind, _, _ in refused} <= {"SubmissionRefused", "QuotaExceeded"}
        assert all((code in ("STORE_ERROR", "DISK_FULL") and "full" in text) or "space" in text for _, code, text in refused), refused[:3]
        (machine.project / "marks").touch()
        subprocess.run(["mount", "-o", "remount,size=64m", str(state)], check=True)
        again = machine.run(
            HEAD
            + f"""
taken = {taken!r}
print(json.dumps([[n, out.status, out.output] for n, out in ((n, Job.from_id(i).result(timeout=40)) for n, i in taken)]))
@remote(queue)
def fine(): return 1
assert fine().result().unwrap() == 1
"""
        )
        assert again.out.strip().splitlines()
        assert again.json == [[n, "COMPLETED", n] for n, _ in taken]


@pytest.mark.root
@pytest.mark.usefixtures("may_mount")
def test_t44_what_has_begun_is_stored_as_soon_as_there_is_room_and_nothing_else_begins_before(tmp_path: Path) -> None:
    """A call may begin before it is stored (docs/decisions/0099); the full disk shows itself only then."""
    with small_disk("6m") as (machine, state):
        marks, ballast = tmp_path / "marks", state / "ballast"
        result = machine.run(
            HEAD
            + f"""
@remote(queue, max_retries=0)
def f(n, data):
    with open({str(marks)!r}, "a") as file: print(n, file=file)
    return n
for n in (-2, -1): f(n, os.urandom(40_000)).result()
with open({str(ballast)!r}, "wb", buffering=0) as file:
    try:
        while file.write(bytes(4096)): pass
    except OSError: pass
late, refused = [], []
for n in range(100):
    handle = f(n, os.urandom(40_000))
    try: handle.result(timeout=2)
    except TimeoutError: late.append([n, handle])
    except RemotedError as error: refused.append(str(error))
    if late and refused: break
before = open({str(marks)!r}).read().split()
os.unlink({str(ballast)!r})
print(json.dumps([[[n, h.result(timeout=30).output] for n, h in late], refused, before, f(1000, b"").result(timeout=30).output]))
"""
        )
        late, refused, before, last = result.json
        assert late, refused
        assert late == [[n, n] for n, _ in late]
        assert all("full" in text for text in refused), refused
        assert refused
        assert last == 1000
        runs = marks.read_text(encoding="utf-8").split()
        assert sorted(set(runs)) == sorted(runs), "no body ran twice"
        assert runs == [*before, "1000"]


@pytest.mark.root
@pytest.mark.usefixtures("may_mount")
def test_t44_a_result_that_finds_no_room_is_a_failed_job_that_says_so() -> None:
    with small_disk("4m") as (machine, _):
        result = machine.run(
            HEAD
            + """
@remote(queue, max_retries=2)
def f(size): return bytes(size)
out, small = f(20 << 20).result(timeout=30), f(10).result(timeout=30)
print(json.dumps([out.status, out.state_reason, out.error, out.attempts, small.status]))
"""
        )
        status, reason, error, attempts, small = result.json
        assert (status, reason, attempts, small) == ("FAILED", "RESULT_LOST", 1, "COMPLETED")
        assert "free some space" in error


@pytest.mark.root
@pytest.mark.usefixtures("may_mount")
def test_t44_output_that_finds_no_room_does_not_end_the_job() -> None:
    with small_disk("4m") as (machine, _):
        result = machine.run(
            HEAD
            + """
@remote(queue, max_retries=0)
def f():
    for _ in range(20_000): print("x" * 999)
    return "done"
import io
real, sys.stdout, sys.stderr = sys.stdout, io.StringIO(), io.StringIO()
out = f.options(detach=True)()
deadline = time.monotonic() + 20
sys.stdout = real
print(out.id)
"""
        )
        job = result.out.strip()
        subprocess.run(["mount", "-o", "remount,size=64m", str(machine.state)], check=True)
        again = machine.run(HEAD + f"out = Job.from_id({job!r}).result(timeout=30); print(json.dumps([out.status, out.output]))")
        assert again.json == ["COMPLETED", "done"]
