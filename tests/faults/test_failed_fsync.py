"""T51: an fsync fails. What the database says from then on may not be on the disk, so nothing more is said."""

from __future__ import annotations

import shutil
import signal
import subprocess
from pathlib import Path

import pytest

from tests.faults.test_daemon_deaths import HEAD, end_daemon, lines_of
from tests.harness import Host, wait_until

pytestmark = pytest.mark.skipif(shutil.which("strace") is None, reason="NO STRACE: a failing fsync was not tested")


def fail_every_fsync(host: Host) -> subprocess.Popen[bytes]:
    """From now on, and only of the database: content has files and an answer of its own."""
    assert host.process is not None
    database = host.state / "remoted" / "remoted.sqlite3"
    trace = host.folder / "strace"
    calls = "fsync,fdatasync"
    command = ["strace", "-f", "-o", str(trace), "-e", f"trace={calls}", "-e", f"inject={calls}:error=EIO", "-P", f"{database}-wal", "-P", str(database), "-p", str(host.process.pid)]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    tasks = Path(f"/proc/{host.process.pid}/task")
    wait_until(lambda: process.poll() is not None or all(_is_traced(task) for task in tasks.iterdir()), 10)
    if process.poll() is not None:
        pytest.skip("CANNOT TRACE: a failing fsync was not tested")
    return process


def _is_traced(task: Path) -> bool:
    lines = (task / "status").read_text(encoding="ascii", errors="replace").splitlines()
    return next(line for line in lines if line.startswith("TracerPid")).split()[1] != "0"


def test_t51_after_a_failed_fsync_nothing_is_stored_and_the_daemon_ends(daemon: Host) -> None:
    marks, gate = daemon.project / "tokens", daemon.project / "gate"
    script = (
        HEAD
        + f"""
@remote(queue)
def f():
    token({str(marks)!r})
    while not os.path.exists({str(gate)!r}): time.sleep(0.01)
    return 7
"""
    )
    running = daemon.run(script + "print(f.options(detach=True)().id)").out.strip()
    wait_until(lambda: len(lines_of(marks)) == 1, 20, daemon.log)
    tracer = fail_every_fsync(daemon)
    # Refused, or carried to the next daemon: as the answer or the end of the connection comes first.
    second = daemon.run(script + "print(f.options(detach=True)().id)", check=False)
    assert daemon.process is not None
    assert daemon.process.wait(20) == 1, daemon.log()
    tracer.send_signal(signal.SIGTERM)
    tracer.wait(10)
    assert "started your own daemon" in second.err if second.code == 0 else "an fsync failed before" in second.err, second.err
    assert daemon.log().count("this daemon stores nothing more and ends") == 1
    gate.touch()
    acknowledged = [running, *second.out.split()]
    found = daemon.run(HEAD + f"print(json.dumps([[o.status, o.output, o.attempts] for o in (Job.from_id(i).result() for i in {acknowledged})]))")
    assert found.json == [["COMPLETED", 7, 1]] * len(acknowledged)
    end_daemon(daemon)
