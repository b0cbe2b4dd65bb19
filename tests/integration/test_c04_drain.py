"""C04: ``remotectl drain`` and ``resume``: nothing new begins, running goes on, nothing is lost, and a restart changes nothing."""

from __future__ import annotations

import json
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from remoted.errors import Conflict
from remoted.gate import Drain, Gate
from remoted.model import Reason, Status
from tests.harness import Host, wait_until
from tests.integration.test_api import Daemon, running
from tests.integration.test_c04_remotectl import Terminal


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with running(tmp_path) as daemon:
        yield daemon


# -- the gate ----------------------------------------------------------------------------------------------


async def test_c04_durable_jobs_wait_while_it_is_drained_and_keep_their_order(daemon: Daemon) -> None:
    before = [await daemon.submit("one"), await daemon.submit("two")]

    status, document, _ = await daemon.ask("POST", "/v1/drain", {"why": "new driver"})
    before += [await daemon.submit("three")]

    assert (status, document["held"], document["drain"]["why"]) == (200, 2, "new driver")
    assert list(daemon.engine.gate.held) == [call.id for call in before]
    assert not list(daemon.engine.scheduler.waiting())
    daemon.engine.scheduler.validate()
    await daemon.ask("POST", "/v1/resume", {})
    assert [ticket.id for _, _, ticket in daemon.engine.scheduler.waiting()] == [call.id for call in before]
    daemon.engine.scheduler.validate()


async def test_c04_a_drain_is_shown_with_its_reason(daemon: Daemon) -> None:
    call = await daemon.submit()
    await daemon.ask("POST", "/v1/drain", {"why": "new driver"})

    _, status, _ = await daemon.ask("GET", "/v1/status")
    _, shown, _ = await daemon.ask("GET", f"/v1/jobs/{call.id}")

    assert status["daemon"]["draining"] is True
    assert status["daemon"]["drain"]["why"] == "new driver"
    assert [job["id"] for job in status["queue"]] == [call.id]
    assert (shown["state_reason"], shown["detail"]) == ("DRAINED", "an administrator drains this daemon (new driver)")
    await daemon.ask("POST", "/v1/resume", {})
    _, shown, _ = await daemon.ask("GET", f"/v1/jobs/{call.id}")
    assert shown["state_reason"] == "WAITING_WORKER"


async def test_c04_a_job_that_waits_for_the_end_of_a_drain_can_be_cancelled(daemon: Daemon) -> None:
    await daemon.ask("POST", "/v1/drain", {})
    call = await daemon.submit()

    await daemon.finish(call)

    assert call.status is Status.CANCELLED
    assert not daemon.engine.gate.held


async def test_c04_with_refuse_new_jobs_are_turned_away_and_old_ones_wait(daemon: Daemon) -> None:
    call = await daemon.submit()
    await daemon.ask("POST", "/v1/drain", {"refuse": True})

    with pytest.raises(Conflict, match="an administrator drains this daemon"):
        await daemon.submit()
    assert list(daemon.engine.gate.held) == [call.id]


async def test_c04_direct_calls_are_refused_at_once(daemon: Daemon) -> None:
    waiting = await daemon.submit(direct=True)

    await daemon.ask("POST", "/v1/drain", {})

    assert (waiting.status, waiting.reason) == (Status.FAILED, Reason.DRAINED)
    with pytest.raises(Conflict, match="drains"):
        await daemon.submit(direct=True)


def test_c04_a_drain_is_read_again_and_a_damaged_one_is_a_drain(tmp_path: Path) -> None:
    file = tmp_path / "drain.json"
    Gate(file).close(Drain(1.0, True, "why"))
    assert Gate(file).drain == Drain(1.0, True, "why")

    file.write_text("{")
    assert Gate(file).is_closed

    assert Gate(file).open() == []
    assert not Gate(file).is_closed


# -- with workers ------------------------------------------------------------------------------------------

SLOW = """
import sys, time
from pathlib import Path
from remoted_client import remote, CpuLiveServerless
folder = Path(sys.argv[1])
@remote(CpuLiveServerless(name="p", workersMax=2))
def inner(): return "inner"
@remote(CpuLiveServerless(name="p", workersMax=2))
def outer():
    (folder / "began").touch()
    while not (folder / "go").exists(): time.sleep(0.01)
    return inner().result().unwrap()
print(outer().result().unwrap())
"""


def test_c04_what_runs_goes_on_with_what_it_calls_and_the_rest_waits_over_a_restart(daemon_host: Host) -> None:
    host, remotectl = daemon_host, Terminal(daemon_host)
    running_script = host.popen(host.write("slow.py", SLOW), str(host.folder))
    wait_until((host.folder / "began").exists, 60)

    drained = remotectl.json("drain", "--why", "upgrade")
    job = remotectl.job("true")
    assert drained["running"] == 1
    (host.folder / "go").touch()
    out, err = running_script.communicate(timeout=60)
    assert out.strip() == "inner", err

    host.kill()
    host.start()
    assert remotectl.json("show", job)["state_reason"] == "DRAINED"
    code, out, _ = remotectl("status")
    assert "drained (upgrade): nothing new begins" in out
    assert remotectl.json("resume")["held"] == 1
    assert remotectl("wait", job)[0] == code == 0
    assert remotectl.json("show", job)["status"] == "COMPLETED"


LEASED = """
import json, sys, time
from pathlib import Path
from remoted_client import remote, CpuLiveLoadBalancer, SubmissionRefused
@remote(CpuLiveLoadBalancer(name="d"))
def f(): return 1
assert f().result() == 1
print("leased", flush=True)
try:
    while True:
        f().result()
except SubmissionRefused as error:
    print(json.dumps([error.code, str(error)]))
"""


def test_c04_a_client_on_a_lease_is_refused_too(daemon_host: Host) -> None:
    script = daemon_host.popen(LEASED)
    assert script.stdout is not None
    assert script.stdout.readline() == "leased\n"

    Terminal(daemon_host).json("drain")

    out, err = script.communicate(timeout=60)
    assert json.loads(out)[0] == "DRAINED", err


def test_c04_drain_waits_for_what_runs_if_it_is_asked_to(daemon_host: Host) -> None:
    remotectl = Terminal(daemon_host)
    job = remotectl.job("sleep", "1")
    wait_until(lambda: remotectl.json("show", job)["status"] == "IN_PROGRESS", 60)

    assert remotectl.json("drain", "--wait")["running"] == 0
    assert remotectl.json("show", job)["status"] == "COMPLETED"


@pytest.fixture
def daemon_host(bare_host: Host) -> Host:
    return bare_host.start()
