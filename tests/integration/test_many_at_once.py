"""Hundreds of bodies of one worker that end in the same moment."""

from __future__ import annotations

import json

from tests.harness import Host, wait_until
from tests.integration.test_f30_preload import ctl

SCRIPT = """
import asyncio, json, os
from remoted_client import remote, CpuLiveServerless
@remote(CpuLiveServerless(name="burst", workersMax=1, max_concurrency=1000))
async def body(n):
    open("begun%d" % n, "w").close()
    while not os.path.exists("go"): await asyncio.sleep(0.05)
    return n
jobs = [body(n) for n in range(900)]
print(json.dumps(sum(job.result().unwrap() for job in jobs)), flush=True)
"""


def test_c07_hundreds_of_calls_that_end_together_leave_their_worker_idle(daemon: Host) -> None:
    """The scheduler is told of each, whatever comes first (docs/decisions/0104)."""
    client = daemon.popen(daemon.write("burst.py", SCRIPT))
    wait_until(lambda: len(list(daemon.project.glob("begun*"))) == 900, 60, daemon.log)
    (daemon.project / "go").touch()
    out, err = client.communicate(timeout=60)

    assert json.loads(out) == sum(range(900)), err
    wait_until(lambda: [(worker["state"], worker["running"]) for worker in ctl(daemon, "workers")["workers"]] == [("IDLE", [])], 10, daemon.log)
    assert "Traceback" not in daemon.log()
