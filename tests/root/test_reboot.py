"""C09: a host that is rebooted in good order while jobs wait, start and run. Debian, booted three times.

What had not begun is nobody's failure and waits for the next boot; what ran is lost with the host, by that name, or tried again.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import pytest

from tests.root.booted import booted

pytestmark = [pytest.mark.root, pytest.mark.timeout(500)]

JOB = """
import json, os, sys, time
from remoted_client import CpuLiveServerless, Job, remote
@remote(CpuLiveServerless(name="q", workersMax=1), max_retries=0)
def once(): last()
@remote(CpuLiveServerless(name="r", workersMax=1), max_retries=1)
def again(): return last()
def last():
    print("begun", flush=True)
    while not os.path.exists("/trial/second"): time.sleep(0.02)
verb, *rest = sys.argv[1:]
if verb == "begin":
    jobs = [function.options(detach=True)() for function in (once, again)]
    for job in jobs:
        while b"begun" not in os.popen(f"remotectl logs {job.id} 2>&1").read().encode(): time.sleep(0.05)
    print(json.dumps([job.id for job in jobs]))
if verb == "outcomes":
    outs = [Job.from_id(id).result() for id in json.loads(*rest)]
    print(json.dumps([[out.status, out.state_reason, out.error, out.attempts, out.output, out.stdout] for out in outs]))
"""

#: Keeps the shutdown waiting in front of the daemon's stop: a job comes when no scope is made any more.
LATE = """[Unit]
After=remoted.service
[Service]
RemainAfterExit=yes
Type=oneshot
ExecStart=/bin/true
ExecStop=/bin/bash /trial/late.sh
"""
TRIAL = (
    r"""
job() { u=$1; shift; as $u /opt/remoted/bin/python /trial/job.py "$@" 2>>/trial/log; }
command() { as $1 remotectl run -d -- echo after; }
look() { say $1 "$(as $1 remotectl wait --json $(cat /trial/queued.$1))"; say $1.printed "$(as $1 remotectl logs $(cat /trial/queued.$1))"; }
if [ ! -e /trial/first ]; then
    python3 -m venv /v && /v/bin/pip install -q --disable-pip-version-check '/src[daemon]' >>/trial/log
    /v/bin/remotectl install >>/trial/log; useradd -m carl; useradd -m dora
    job alice begin | tail -n 1 >/trial/begun
    for u in bob carl dora; do command $u >/trial/queued.$u & done; wait
    touch /trial/first; systemctl reboot; sleep 100
elif [ ! -e /trial/second ]; then
    touch /trial/second
    say begun "$(job alice outcomes "$(cat /trial/begun)")"
    for u in bob carl dora; do look $u; done
    cat >/etc/systemd/system/remoted-late.service <<'END'
"""
    + LATE
    + r"""END
    { sed '/^exec/d; /^cd/,$d' /trial/trial.sh; declare -f command; echo 'command alice >/trial/queued.alice; while systemctl is-active --quiet remoted; do sleep 0.05; done'; } >/trial/late.sh
    systemctl daemon-reload; systemctl start remoted-late; systemctl reboot; sleep 100
fi
look alice; say log "$(journalctl -u remoted -o cat --no-pager | grep -c 'the host goes down')"
"""
)
QUEUED = ("bob", "carl", "dora")


@pytest.fixture(scope="module", params=["bookworm", "trixie"])
def said(request: pytest.FixtureRequest) -> Iterator[dict[str, str]]:
    with booted(request.param, TRIAL, JOB) as found:
        yield found


def _read(said: dict[str, str], name: str) -> Any:
    return json.loads(said[name])


@pytest.mark.parametrize("user", QUEUED)
def test_c09_a_job_that_was_about_to_start_at_a_reboot_runs_after_it(said: dict[str, str], user: str) -> None:
    """One that had begun in that very moment may be lost with the host."""
    [job] = _read(said, user)["jobs"]

    assert (job["status"], job["state_reason"]) in (("COMPLETED", ""), ("FAILED", "LOST")), job
    assert job["status"] == "FAILED" or said[f"{user}.printed"].split() == ["after"]


def test_c09_what_ran_at_a_reboot_is_lost_with_the_host_or_tried_again(said: dict[str, str]) -> None:
    once, again = _read(said, "begun")

    assert once[:2] == ["FAILED", "LOST"], once
    assert again[0] == "COMPLETED", again
    assert again[3] == 2


def test_c09_a_daemon_that_finds_the_host_going_down_fails_nobody_and_ends(said: dict[str, str]) -> None:
    [job] = _read(said, "alice")["jobs"]

    assert (job["status"], job["attempts"]) == ("COMPLETED", 1), job
    assert said["alice.printed"].split() == ["after"]
    assert int(said["log"]) >= 1, "the daemon did not notice"
