"""C04: a user's own limits and weight, from the configuration to the refusal and the turn."""

from __future__ import annotations

import os

from tests.harness import host, wait_until
from tests.integration.test_c04_remotectl import Terminal

QUEUE = """
import json
from remoted_client import remote, CpuLiveServerless, SubmissionRefused
@remote(CpuLiveServerless(name="p", workersMax=1))
def f(): return 1
handles, told = [], ""
try:
    for _ in range(5): handles.append(f.options(detach=True)().id)
except SubmissionRefused as error: told = str(error)
print(json.dumps(told))
"""


def test_c04_a_user_has_a_limit_of_running_calls_of_his_own() -> None:
    """Over all pools; the rest waits and says why, and goes on when there is room."""
    with host(f"[users.{os.geteuid()}]\nrunning_jobs = 1\n") as made:
        remotectl = Terminal(made.start())
        first = remotectl.job("sleep", "100", name="first")
        wait_until(lambda: remotectl.json("show", first)["status"] == "IN_PROGRESS", 60)
        second = remotectl.job("true", name="second")

        wait_until(lambda: remotectl.json("show", second)["state_reason"] == "WAITING_QUOTA", 60)
        assert remotectl.json("show", second)["detail"] == "your limit running_jobs is 1"

        remotectl("cancel", first)
        assert remotectl("wait", second)[0] == 0


NESTED = """
from remoted_client import remote, CpuLiveServerless
@remote(CpuLiveServerless(name="a"))
def inner(): return "inner"
@remote(CpuLiveServerless(name="b"))
def outer(): return inner().result().unwrap()
print(outer().result().unwrap())
"""


def test_c04_what_a_running_body_calls_is_not_held_by_its_own_limit() -> None:
    with host("[limits]\nrunning_jobs_per_uid = 1\n") as made:
        assert made.start().run(NESTED).out.strip() == "inner"


def test_c04_a_refusal_names_the_limit_of_queued_jobs() -> None:
    with host(f"[users.{os.geteuid()}]\nqueued_jobs = 0\n") as made:
        assert "your limit queued_jobs is 0" in made.start().run(QUEUE).json
