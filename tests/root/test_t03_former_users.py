"""T03: whose account is gone, or whose uid is somebody else's by now, has nothing run any more that waits."""

from __future__ import annotations

import json
import pwd
import subprocess
from collections.abc import Iterator

import pytest

from tests.harness import wait_until
from tests.root.system_host import SystemHost, User, accounts, system_host

pytestmark = pytest.mark.root

SUBMIT = """
import json, sys
from remoted_client import CpuLiveServerless, remote
@remote(CpuLiveServerless(name="q"), max_retries=2, dependencies=json.loads(sys.argv[1]))
def leave_a_mark(): open("mark", "w").close()
print(json.dumps(leave_a_mark.options(detach=True)().id))
"""
OUTCOME = """
import json, sys
from remoted_client import Job
out = Job.from_id(sys.argv[1]).result()
print(json.dumps([out.status, out.state_reason, out.error, out.attempts]))
"""


@pytest.fixture
def account() -> Iterator[pwd.struct_passwd]:
    """Carl's, which goes when nobody runs as him any more."""
    with accounts("remoted-carl") as [made]:
        yield made


@pytest.fixture
def host(account: pwd.struct_passwd) -> Iterator[SystemHost]:
    with system_host("") as made:
        yield made.start()


def _wait_for(host: SystemHost, user: User, dependencies: tuple[str, ...] = ()) -> str:
    """A job of this user that waits while the daemon is drained."""
    host.user("root", 0).remotectl("drain")
    return str(user.run(SUBMIT, json.dumps(dependencies)).json)


def _rename(account: pwd.struct_passwd, name: str) -> None:
    subprocess.run(["userdel", account.pw_name], check=True, capture_output=True)
    if name:
        subprocess.run(["useradd", "--no-create-home", "--uid", str(account.pw_uid), "--user-group", name], check=True, capture_output=True)


@pytest.mark.parametrize("dependencies", [(), ("nothing==1",)], ids=["worker", "environment"])
def test_t03_what_waits_of_a_deleted_user_is_not_run(host: SystemHost, account: pwd.struct_passwd, dependencies: tuple[str, ...]) -> None:
    """Without a restart of the daemon, which remembers that there was such a user."""
    carl = host.user("carl", account.pw_uid, account.pw_gid)
    job = _wait_for(host, carl, dependencies)
    _rename(account, "")
    host.user("root", 0).remotectl("resume")
    wait_until(lambda: "status=FAILED" in host.log(), 30, host.log)

    _rename_back(account)
    host.stop()
    host.start()  # it is remembered for ten seconds that there is none
    status, reason, error, attempts = _outcome(host, carl, job)

    assert (status, reason) == ("FAILED", "ENVIRONMENT" if dependencies else "UNKNOWN_USER")
    assert f"uid {account.pw_uid}: it has no account on this host any more" in error
    assert attempts == 0
    assert not (carl.home / "mark").exists()


def test_t03_what_waits_of_a_former_user_is_not_run_as_the_next_one_of_the_uid(host: SystemHost, account: pwd.struct_passwd) -> None:
    carl = host.user("carl", account.pw_uid, account.pw_gid)
    job = _wait_for(host, carl)
    host.stop()
    _rename(account, "remoted-dora")
    try:
        host.start()
        host.user("root", 0).remotectl("resume")
        status, reason, error, _ = _outcome(host, carl, job)
    finally:
        subprocess.run(["userdel", "remoted-dora"], check=True, capture_output=True)
        _rename_back(account)

    assert (status, reason) == ("FAILED", "UNKNOWN_USER")
    assert "that was remoted-carl when the call was made, and is remoted-dora now" in error
    assert not (carl.home / "mark").exists()


def test_t03_what_waits_of_a_user_who_is_still_there_is_run(host: SystemHost, account: pwd.struct_passwd) -> None:
    carl = host.user("carl", account.pw_uid, account.pw_gid)
    job = _wait_for(host, carl)
    host.stop()
    host.start()
    host.user("root", 0).remotectl("resume")

    assert _outcome(host, carl, job)[0] == "COMPLETED"
    assert (carl.home / "mark").exists()


def _outcome(host: SystemHost, user: User, job: str) -> tuple[str, str, str, int]:
    status, reason, error, attempts = user.run(OUTCOME, job).json
    return status, reason, error, attempts


def _rename_back(account: pwd.struct_passwd) -> None:
    """So that whoever asks for the outcome is served, and the account can be removed."""
    subprocess.run(["useradd", "--no-create-home", "--uid", str(account.pw_uid), "--user-group", account.pw_name], check=True, capture_output=True)
