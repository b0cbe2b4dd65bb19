"""C04, C10: what root sees and steers of a daemon for many users, and what those users see of each other."""

from __future__ import annotations

import json
import re
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.harness import wait_until
from tests.root.system_host import UNKNOWN, SystemHost, User, system_host

pytestmark = pytest.mark.root

SECRET = "swordfish-project"
SCRIPT = f"""
from remoted_client import remote, CpuLiveServerless
@remote(CpuLiveServerless(name="{SECRET}"))
def f(): return 1
f.options(name="{SECRET}")().result().unwrap()
"""
METRICS = "import sys; from remoted.cli import transport; sys.stdout.buffer.write(transport.request('GET', '/metrics').read())"


@pytest.fixture(scope="module")
def host() -> Iterator[SystemHost]:
    with system_host(UNKNOWN) as made:
        yield made.start()


@pytest.fixture
def people(host: SystemHost) -> tuple[User, User, User]:
    return host.user("root", 0), host.user("alice", 60001), host.user("bob", 60002)


def _metrics(user: User) -> str:
    process = user.popen_command([str(user.host.python), "-c", METRICS])
    return process.communicate(timeout=60)[0]


def test_c10_metrics_name_users_to_root_and_jobs_to_nobody(people: tuple[User, User, User]) -> None:
    root, alice, bob = people
    alice.run(SCRIPT)

    assert 'remoted_user_jobs_ended_total{status="COMPLETED",uid="60001"}' in _metrics(root)
    assert "remoted_jobs_ended_total" in _metrics(bob)
    assert "60001" not in _metrics(bob)
    assert SECRET not in _metrics(root) + _metrics(bob)


def test_c10_users_shows_root_everybody_and_others_themselves(people: tuple[User, User, User]) -> None:
    root, alice, bob = people
    alice.run(SCRIPT)

    assert "60001" in root.remotectl("users").out
    assert "60001" not in bob.remotectl("users", "--json").out
    assert "others (0 active)" in bob.remotectl("users").out
    assert "others" not in root.remotectl("users").out


def test_c04_only_root_may_drain_and_everybody_sees_it(people: tuple[User, User, User]) -> None:
    root, alice, bob = people
    refused = alice.remotectl("drain", check=False)
    assert (refused.code, "administrator" in refused.err) == (1, True)

    root.remotectl("drain", "--refuse", "--why", "new driver")
    try:
        assert "drained (new driver)" in bob.remotectl("status").out
        assert "an administrator drains this daemon (new driver)" in alice.run(SCRIPT, check=False).err
        assert bob.remotectl("resume", check=False).code == 1
    finally:
        root.remotectl("resume")
    alice.run(SCRIPT)


def test_c10_the_systems_daemon_writes_an_audit_line_for_each_job(host: SystemHost, people: tuple[User, User, User]) -> None:
    people[1].run(SCRIPT)

    assert f'uid=60001 name="{SECRET}" pool="{SECRET}" status=COMPLETED' in host.log()


RUNNING = f"""
import os, time
from remoted_client import remote, CpuLiveServerless
@remote(CpuLiveServerless(name="{SECRET}"))
def f(argument):
    print("the output", flush=True)
    while not os.path.exists("go"): time.sleep(0.01)
f.options(name="{SECRET}")("the argument").result()
"""


def _reload(host: SystemHost, text: str) -> None:
    assert host.process is not None
    seen = host.log().count("the configuration was reloaded")
    (host.prefix / "etc/remoted/conf.d/20.toml").write_text(text, encoding="utf-8")
    host.process.send_signal(signal.SIGHUP)
    wait_until(lambda: host.log().count("the configuration was reloaded") > seen, 30, host.log)


def test_t10_of_others_no_more_is_seen_than_the_configuration_lets(host: SystemHost, people: tuple[User, User, User]) -> None:
    root, alice, bob = people
    (host.prefix / "etc/remoted/conf.d").mkdir(exist_ok=True)
    job = alice.popen(RUNNING)
    wait_until(lambda: '"IN_PROGRESS"' in alice.remotectl("ps", "--json").out, 60, host.log)
    own = json.loads(alice.remotectl("ps", "--json").out)["jobs"][0]
    try:
        status = json.loads(bob.remotectl("status", "--json").out)
        [seen] = status.pop("others")
        assert {name: seen[name] for name in ("uid", "name", "pool", "status", "gpus")} == {"uid": 60001, "name": SECRET, "pool": SECRET, "status": "IN_PROGRESS", "gpus": []}
        assert set(seen) == {"uid", "name", "pool", "status", "gpus", "submitted_at", "started_at", "id", "worker", "pid"}
        assert (seen["id"], seen["worker"], seen["pid"]) == ("", "", 0), "that is for an administrator"
        assert not [word for word in (SECRET, own["id"], "__main__", "the argument") if word in json.dumps(status) + bob.remotectl("ps", "-a", "--json").out]
        shown = bob.remotectl("status").out
        assert SECRET in shown
        assert re.search(r"^0 running \(and 1 of others\), 0 queued, 0 workers \(and [1-9]\d* of others\), ", shown, re.MULTILINE)

        _reload(host, '[privacy]\nothers = "totals"\n')
        assert json.loads(bob.remotectl("status", "--json").out)["others"] == []
        assert json.loads(bob.remotectl("users", "--json").out)["others"]["running"] == 1
        assert len(json.loads(root.remotectl("status", "--json").out)["others"]) == 1

        _reload(host, '[privacy]\nothers = "nothing"\n')
        assert json.loads(bob.remotectl("users", "--json").out)["others"] is None
        assert json.loads(bob.remotectl("status", "--json").out)["counts"]["workers"] == 0
    finally:
        _reload(host, "")
        (alice.home / "go").touch()
        job.communicate(timeout=60)


def _live(user: User) -> list[dict[str, Any]]:
    return list(json.loads(user.remotectl("ps", "--json").out)["jobs"])


def test_c10_an_administrator_sees_and_ends_anybodys_job_and_reads_nothing_of_it(host: SystemHost, people: tuple[User, User, User]) -> None:
    root, alice, bob = people
    (alice.home / "go").unlink(missing_ok=True)
    running = alice.popen(RUNNING)
    try:
        wait_until(lambda: [job["status"] for job in _live(alice)] == ["IN_PROGRESS"], 60, host.log)
        [own] = _live(alice)
        [seen] = json.loads(root.remotectl("status", "--json").out)["others"]
        assert (seen["id"], seen["worker"]) == (own["id"], own["worker"])
        assert Path(f"/proc/{seen['pid']}").stat().st_uid == alice.uid
        assert own["id"][:8] in root.remotectl("status").out
        for command in (("show",), ("logs",), ("wait", "--timeout", "1"), ("retry",)):
            assert root.remotectl(*command, own["id"], check=False).code == 4, command

        refused = bob.remotectl("cancel", own["id"], check=False)
        unknown = bob.remotectl("cancel", "0" * 32, check=False)
        assert (refused.code, refused.err.replace(own["id"], "0" * 32)) == (4, unknown.err), "as one that never was (T10)"
        assert [job["status"] for job in _live(alice)] == ["IN_PROGRESS"]

        assert "cancelling" in root.remotectl("cancel", own["id"][:12]).out
        running.communicate(timeout=60)
    finally:
        (alice.home / "go").touch()
        running.kill()
        running.communicate()
    ended = json.loads(alice.remotectl("show", own["id"], "--json").out)
    assert (ended["status"], ended["state_reason"]) == ("CANCELLED", "ADMINISTRATOR")
    assert "an administrator of this host has cancelled it" in ended["error"]
    assert f"job {own['id']} of uid {alice.uid} is cancelled by uid 0" in host.log()
    assert root.remotectl("cancel", own["id"], check=False).code == 4, "it is over, and not root's"


def test_c10_an_administrator_ends_what_waits(host: SystemHost, people: tuple[User, User, User]) -> None:
    root, alice, _ = people
    root.remotectl("drain")
    try:
        process = alice.popen(SCRIPT)
        wait_until(lambda: [job["status"] for job in _live(alice)] == ["IN_QUEUE"], 60, host.log)
        [own] = _live(alice)
        root.remotectl("cancel", own["id"])
        _, err = process.communicate(timeout=60)
    finally:
        root.remotectl("resume")
    assert "an administrator of this host has cancelled it" in err


def test_t31_a_reload_does_not_believe_what_is_not_roots(host: SystemHost) -> None:
    assert host.process is not None
    folder = host.prefix / "etc/remoted/conf.d"
    folder.mkdir(exist_ok=True)
    file = folder / "10.toml"
    file.write_text("[limits]\nnesting_depth = 1\n", encoding="utf-8")
    file.chmod(0o666)

    host.process.send_signal(signal.SIGHUP)

    wait_until(lambda: "the configuration was not reloaded" in host.log(), 30, host.log)
    assert "others than its owner may write" in host.log()


def test_c04_doctor_sees_that_users_cannot_reach_the_workers_program(host: SystemHost, people: tuple[User, User, User]) -> None:
    """A folder above it was closed: who has a warm worker notices nothing."""
    _, alice, _ = people

    def check() -> dict[str, object]:
        found = json.loads(alice.remotectl("doctor", "--json", check=False).out)["checks"]
        [named] = [check for check in found if check["name"] == "worker program"]
        return dict(named)

    assert check()["ok"]
    host.state.chmod(0o700)
    try:
        found = check()
        assert not found["ok"]
        assert found["detail"] == f"{host.state} is closed to users: no new worker can start"
        assert found["advice"] == f"run: chmod o+x {host.state}"
    finally:
        host.state.chmod(0o711)


def test_c04_doctor_tells_an_administrator_of_the_configuration_and_nobody_else(host: SystemHost, people: tuple[User, User, User]) -> None:
    root, alice, _ = people

    def names(user: User) -> set[str]:
        return {check["name"] for check in json.loads(user.remotectl("doctor", "--json", check=False).out)["checks"]}

    assert "configuration" in names(root)
    assert "configuration" not in names(alice)  # at these sockets: which file it reads is the administrator's affair
