"""C10: who used how much is counted by the hour, survives restarts, and is shown to everybody of herself only."""

from __future__ import annotations

import json
import os
from collections.abc import AsyncIterator
from pathlib import Path

import pytest
from aiohttp import web
from aiohttp.test_utils import make_mocked_request

from remoted.access import Access, Peer
from remoted.api.exchange import Ask
from remoted.api.users import users
from remoted.attempts import AttemptEnd
from remoted.limits import Share
from remoted.model import DeviceUuid, Reason, Status
from remoted.usage import HOUR_SECONDS, Pending, Span, Totals, charge_all, totals
from tests.harness import Host, wait_until
from tests.integration.test_api import Daemon, running
from tests.integration.test_c04_remotectl import Terminal
from tests.old_schemas import make_old


@pytest.fixture
async def daemon(tmp_path: Path) -> AsyncIterator[Daemon]:
    async with running(tmp_path) as daemon:
        yield daemon


def test_c10_a_span_is_shared_out_to_its_hours() -> None:
    assert list(Span(1, 3500.0, 7300.0, 1, 1.0).hours()) == [(0, 100.0), (1, 3600.0), (2, 100.0)]
    assert list(Span(1, 3600.0, 7200.0, 1, 1.0).hours()) == [(1, 3600.0)]
    assert list(Span(1, 10.0, 5.0, 1, 1.0).hours()) == [], "the clock went back"
    assert len(list(Span(1, 0.0, 1e9, 1, 1.0).hours())) <= 8 * 24 + 1, "the clock leapt"


async def test_c10_usage_is_summed_by_user_and_window(daemon: Daemon) -> None:
    now = 1000 * 24.0 * HOUR_SECONDS

    def store(db: object) -> tuple[dict[int, Totals], dict[int, Totals]]:
        for span in (Span(1, now - 7200, now, 2, 4.0), Span(1, now - 3 * 86_400 - 100, now - 3 * 86_400, 1, 1.0), Span(2, now - 60, now, 0, 1.0)):
            used = Pending()
            used.add(span)
            charge_all(db, used.take())  # type: ignore[arg-type]
        return totals(db, now, 86_400), totals(db, now, 7 * 86_400)  # type: ignore[arg-type]

    day, week = await daemon.store.submit(store)

    assert day == {1: Totals(14_400, 28_800), 2: Totals(0, 60)}
    assert week == {1: Totals(14_500, 28_900), 2: Totals(0, 60)}


async def test_c10_an_attempt_is_charged_once_and_a_lost_one_not_at_all(daemon: Daemon) -> None:
    for reason, expected in ((None, 100.0), (Reason.LOST, 0.0)):
        uid = 1000 + bool(reason)
        call = await daemon.submit(uid=uid)
        row = (call.seq, 1, call.id, "w", 1, 0.0, "b", "", 1, 0.0)
        await daemon.store.submit(lambda db, row=row: db.many("begin_attempts", [row]))
        call.token, call.attempts, call.devices = call.id, 1, (DeviceUuid("GPU-1"),)  # type: ignore[assignment]
        call.attempt_started = daemon.clock.wall() - 100

        daemon.jobs.attempt_ended(call, call.token, AttemptEnd("died", message="gone", reason=reason or Reason.WORKER_DIED))
        await daemon.jobs.close()

        assert call.status is Status.FAILED
        used = (await daemon.jobs.records.used(86_400)).get(uid, Totals())
        assert used.gpu_seconds == pytest.approx(expected, abs=5)


def test_c10_what_has_no_row_waits_for_the_next_transaction() -> None:
    pending = Pending()
    pending.add(Span(1, 0.0, 10.0, 2, 1.0))
    pending.add(Span(1, 20.0, 30.0, 0, 3.0))

    assert pending.take() == {(1, 0): Totals(20.0, 40.0)}
    assert pending.take() == {}


async def test_c10_an_administrator_sees_everybody(daemon: Daemon) -> None:
    daemon.limits.users[12345] = Share(weight=3)
    await daemon.submit(uid=12345)
    await daemon.submit(uid=12346)

    _, document, _ = await daemon.ask("GET", "/v1/users")

    assert document["others"] is None
    found = {user["uid"]: user for user in document["users"]}
    assert (found[12345]["queued"], found[12345]["weight"], found[12345]["share"]) == (1, 3, 0.75)
    assert found[12346]["share"] == 0.25
    assert found[12345]["stored_bytes"] > 0


async def test_t10_a_user_sees_herself_and_of_others_one_total(daemon: Daemon) -> None:
    daemon.jobs.access = Access(os.geteuid(), serves_everybody=True)
    await daemon.submit(uid=12345)
    await daemon.submit(uid=12346)

    answer = await users(daemon.services, Ask(Peer(12347, 1, 1), {}, None, None, make_mocked_request("GET", "/v1/users")))
    assert isinstance(answer, web.Response)
    document = json.loads(str(answer.text))

    assert [user["uid"] for user in document["users"]] == [12347]
    assert (document["others"]["users"], document["others"]["queued"]) == (2, 2)
    assert "12345" not in str(document)


SCRIPT = """
import time
from remoted_client import remote, CpuLiveServerless, CpuLiveLoadBalancer
@remote(CpuLiveServerless(name="q"))
def queued(): time.sleep(0.2)
@remote(CpuLiveLoadBalancer(name="d"))
def direct(): time.sleep(0.2)
queued().result().unwrap()
direct().result()
"""


def test_c10_remotectl_users_shows_what_was_used_over_a_restart(bare_host: Host) -> None:
    host, remotectl = bare_host.start(), Terminal(bare_host)
    host.run(SCRIPT)
    wait_until(lambda: not remotectl.json("status")["running"], 30)
    host.terminate()
    host.start()

    (mine,) = remotectl.json("users")["users"]
    code, out, _ = remotectl("users")

    assert mine["uid"] == os.geteuid()
    assert 0.4 <= mine["day"]["cpu_seconds"] <= 60
    assert mine["day"]["gpu_seconds"] == 0
    assert mine["stored_bytes"] > 0
    assert code == 0
    assert "GPU WEEK" in out


def test_t52_a_database_of_the_schema_before_gets_its_table(bare_host: Host) -> None:
    host = bare_host.start()
    host.stop()
    (file,) = host.state.rglob("remoted.sqlite3")
    make_old(file, 2)

    host.start()

    assert Terminal(host).json("users")["users"]
    assert file.with_name("remoted.sqlite3.schema-2").exists()
