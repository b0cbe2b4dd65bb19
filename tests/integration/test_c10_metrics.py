"""C10: ``/metrics`` says how the daemon does, and nothing that one user may not know of another."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from remoted.access import Access, Peer
from remoted.api.metrics import render
from remoted.endings import Ending
from remoted.model import Status
from remoted.tally import OTHERS, Histogram, Tally
from tests.harness import Host
from tests.integration.test_api import SECRET, Daemon, running

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def samples(text: str) -> Samples:
    """(name, labels) -> value, as Prometheus reads it."""
    families = text_string_to_metric_families(text)
    return {(sample.name, tuple(sorted(sample.labels.items()))): sample.value for family in families for sample in family.samples}


async def scrape(daemon: Daemon) -> Samples:
    status, body, headers = await daemon.ask("GET", "/metrics")
    assert status == 200
    assert headers["content-type"].startswith("text/plain; version=0.0.4")
    return samples(body.decode())


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with running(tmp_path) as daemon:
        yield daemon


async def test_c10_metrics_count_what_waits_and_how_calls_ended(daemon: Daemon) -> None:
    waiting, ended, direct = await daemon.submit(), await daemon.submit(), await daemon.submit(direct=True)
    await daemon.finish(ended)
    assert not waiting.status.is_terminal
    assert not direct.status.is_terminal

    found = await scrape(daemon)

    assert found["remoted_jobs", (("kind", "queue"), ("state", "queued"))] == 1
    assert found["remoted_jobs", (("kind", "direct"), ("state", "queued"))] == 1
    assert found["remoted_jobs_ended_total", (("kind", "queue"), ("reason", "CANCELLED"), ("status", "CANCELLED"))] == 1
    assert found["remoted_job_queue_seconds_count", (("kind", "queue"),)] == 1
    assert found["remoted_workers", (("state", "busy"),)] == 0
    assert found["remoted_leases", ()] == 0
    assert found["remoted_event_loop_lag_seconds", ()] >= 0


async def test_c10_metrics_count_commits_refusals_and_connections(daemon: Daemon) -> None:
    await daemon.submit()
    await daemon.ask("GET", f"/v1/jobs/{'0' * 32}")
    await daemon.ask("GET", "/nowhere")

    found = await scrape(daemon)

    assert found["remoted_store_commit_seconds_count", ()] >= 2
    assert found["remoted_store_commit_seconds_bucket", (("le", "+Inf"),)] == found["remoted_store_commit_seconds_count", ()]
    assert found["remoted_refusals_total", (("code", "NOT_FOUND"),)] == 1
    assert found["remoted_refusals_total", (("code", "NO_ROUTE"),)] == 1
    assert found["remoted_connections", (("door", "api"),)] == 1
    assert found["remoted_user_connections", (("door", "api"), ("uid", str(os.geteuid())))] == 1


async def test_c10_metrics_hold_no_text_of_a_users_and_uids_for_administrators_only(daemon: Daemon) -> None:
    await daemon.submit("my-secret-project", uid=12345)
    await daemon.finish(await daemon.submit("my-secret-project", uid=12345))

    for_admin, for_others = render(daemon.services, True).decode(), render(daemon.services, False).decode()

    assert 'remoted_user_jobs{state="queued",uid="12345"} 1.0' in for_admin
    assert 'remoted_user_jobs_ended_total{status="CANCELLED",uid="12345"} 1.0' in for_admin
    assert "12345" not in for_others
    assert "uid=" not in for_others
    for text in (for_admin, for_others):
        assert not re.search("my-secret|demo|train|" + SECRET, text)


async def test_c10_who_sees_uids_is_decided_by_the_rule_of_administrators(tmp_path: Path) -> None:
    async with running(tmp_path) as daemon:
        daemon.jobs.access = Access(os.geteuid() + 1, serves_everybody=True)
        shows_uids = "uid=" in (await daemon.ask("GET", "/metrics"))[1].decode()

    assert shows_uids == (os.geteuid() == 0)


async def test_c10_metrics_of_a_queue_of_thousands_stay_small(daemon: Daemon) -> None:
    for number in range(5000):
        daemon.tally.note_end(Ending("queue", "0", 100_000 + number, "n", "p", Status.COMPLETED, "", 1, 0.0, 0.0, (), "w", 0))

    assert len({uid for uid, _ in daemon.tally.ended_of}) == 4097
    assert daemon.tally.ended_of[OTHERS, Status.COMPLETED] == 904


def test_c10_a_histogram_counts_up_to_each_bound() -> None:
    histogram = Histogram((1.0, 2.0))
    for seconds in (0.5, 1.0, 1.5, 9.0):
        histogram.note(seconds)

    assert histogram.cumulative == [2, 3, 4]
    assert histogram.sum == 12.0


def test_c10_calls_that_ran_are_counted_with_their_leases(bare_host: Host) -> None:
    bare_host.start().run(
        """
        from remoted_client import remote, CpuLiveServerless, CpuLiveLoadBalancer
        @remote(CpuLiveServerless(name="q"))
        def good(): return 1
        @remote(CpuLiveServerless(name="q"))
        def bad(): raise ValueError("no")
        @remote(CpuLiveLoadBalancer(name="d"))
        def direct(): return 2
        assert good().result().output == 1
        assert bad().result().status == "FAILED"
        assert [direct().result() for _ in range(20)] == [2] * 20
        """
    )

    found = samples(_curl(bare_host, "/metrics"))

    assert found["remoted_jobs_ended_total", (("kind", "queue"), ("reason", ""), ("status", "COMPLETED"))] == 1
    assert found["remoted_jobs_ended_total", (("kind", "queue"), ("reason", "EXCEPTION"), ("status", "FAILED"))] == 1
    assert found["remoted_job_run_seconds_count", (("kind", "queue"),)] == 2
    assert sum(value for (name, labels), value in found.items() if name.startswith("remoted_jobs_ended_total") and ("kind", "lease") in labels) + found["remoted_leases", ()] >= 1
    assert found["process_resident_memory_bytes", ()] > 0


def _curl(host: Host, path: str) -> str:
    program = f"from remoted.cli import transport; import sys; sys.stdout.buffer.write(transport.request('GET', {path!r}).read())"
    return subprocess.run([sys.executable, "-c", program], env=host.environ, capture_output=True, text=True, check=True).stdout


LOADED = "import sys, json; import remoted.app; print(json.dumps(sorted(name for name in sys.modules if name.startswith('prometheus_client'))))"


def test_c10_a_daemon_that_nobody_scrapes_does_not_load_the_library(bare_host: Host) -> None:
    done = subprocess.run([sys.executable, "-c", LOADED], env=bare_host.environ, capture_output=True, text=True, check=True)

    assert json.loads(done.stdout) == []


def test_c10_a_tally_counts_by_kind_status_and_reason() -> None:
    tally = Tally()
    tally.note_end(Ending("queue", "0", Peer(1, 1, 1).uid, "n", "p", Status.FAILED, "TIMEOUT", 1, 0.5, 2.0, (), "w", 0))

    assert tally.ended["queue", Status.FAILED, "TIMEOUT"] == 1
    assert tally.run_seconds["queue"].sum == 2.0
