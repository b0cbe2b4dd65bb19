"""SURFACE rows F01 to F06: what the decorator takes, what a call gives, how both kinds end."""

from __future__ import annotations

import pytest

from remoted_client import CpuLiveServerless, remote
from tests.harness import Host

HEAD = """
import asyncio, json, sys, time
from remoted_client import *
from remoted_client import remote, CpuLiveServerless, CpuLiveLoadBalancer, Job, JobOutput, Status, as_completed
queue = CpuLiveServerless(name="queue")
direct = CpuLiveLoadBalancer(name="direct")
"""


def test_f01_a_wrong_config_an_unknown_keyword_and_a_bad_value_fail_at_decoration() -> None:
    config = CpuLiveServerless(name="x")
    with pytest.raises(TypeError, match="resource_config"):
        remote("config")  # type: ignore[call-overload]
    with pytest.raises(TypeError, match="dependencies"):
        remote(config, dependencys=["numpy"])  # type: ignore[call-overload]
    with pytest.raises(ValueError, match="timeout"):
        remote(config, timeout=-1)
    with pytest.raises(TypeError, match="max_retries"):
        remote(config, max_retries="2")  # type: ignore[call-overload]


def test_f02_the_handle_is_a_coroutine_for_async_and_plain_bodies(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(resource_config=queue)
async def double(x): return 2 * x
@remote(queue)
def triple(x): return 3 * x
async def main():
    one = await double(1)
    both = await asyncio.gather(double(2), triple(3))
    task = asyncio.create_task(triple(4))
    handle = double(5)
    first, second = await handle, await handle
    return [one.output, both[0].output, both[1].output, (await task).output, first is second]
print(json.dumps([asyncio.run(main()), asyncio.run(triple(5)).output]))
"""
    )
    assert result.json == [[2, 4, 9, 12, True], 15]


def test_f02_a_wrong_arity_fails_in_the_caller_before_anything_is_sent(bare_host: Host) -> None:
    result = bare_host.run(
        HEAD
        + """
@remote(queue)
def f(a, *, b): return a
for arguments in ({}, {"a": 1}, {"a": 1, "b": 2, "c": 3}):
    try: f(**arguments)
    except TypeError as error: print(error)
"""
    )
    assert len(result.out.splitlines()) == 3
    assert not bare_host.sockets.exists(), "no daemon was needed"


def test_f03_the_same_without_asyncio(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(queue)
def add(a, b=10): return a + b
@remote(direct)
def plus(a, b): return a + b
h = add(1)
out = h.result(timeout=30)
print(json.dumps([
    out.output, h.done(), h.id == out.id, str(h.status()), h.logs(),
    [o.output for o in add.map([1, 2, 3])], [o.output for o in add.map([1, 2], [3, 4])], [o.output for o in add.starmap([(5, 6)])],
    list(plus.map([1, 2], [3, 4])), sorted(x.result() for x in as_completed([plus(1, 1), plus(2, 2)])),
    add.local(3).result().output, add.options(name="named", priority=5, timeout=9, max_retries=0)(1).result().output,
]))
"""
    )
    assert result.json == [11, True, True, "COMPLETED", "", [11, 12, 13], [4, 6], [11], [4, 6], [2, 4], 13, 11]


def test_f03_result_with_a_timeout_leaves_the_work_running(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(queue)
def slow(x):
    time.sleep(x)
    return x
h = slow(1)
try: h.result(timeout=0.1)
except TimeoutError as error: print("timeout")
print(h.result().output)
"""
    )
    assert result.out.split() == ["timeout", "1"]


def test_f03_map_is_lazy_and_yields_in_input_order_even_if_items_fail(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
import itertools
@remote(queue, max_retries=0)
def odd(x):
    if x % 2 == 0: raise ValueError(x)
    return x
@remote(direct)
def odd_direct(x):
    if x % 2 == 0: raise ValueError(x)
    return x
endless = []
for out in odd.map(itertools.count()):
    endless.append(out.output)
    if len(endless) == 6: break
kinds = [type(x).__name__ for x in odd_direct.map(range(4), return_exceptions=True)]
try: list(odd_direct.map(range(4)))
except ValueError as error: kinds.append(str(error))
print(json.dumps([endless, kinds]))
"""
    )
    assert result.json == [[None, 1, None, 3, None, 5], ["ValueError", "int", "ValueError", "int", "0"]]


def test_f04_a_job_output_has_every_field_and_a_failed_job_does_not_raise(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(queue, max_retries=0)
async def work(bad):
    print("to stdout"); print("to stderr", file=sys.stderr)
    if bad: raise ValueError("Invalid input")
    return {"result": "success"}
good, bad = work(False).result(), work(True).result()
assert isinstance(good, JobOutput)
assert good.output == {"result": "success"} and good.error is None and good.status == "COMPLETED"
assert isinstance(good.started_at, int) and isinstance(good.ended_at, int) and good.started_at <= good.ended_at
assert good.attempts == 1 and good.worker_id and good.exception is None and good.gpu == ()
assert good.stdout == "to stdout\\n" and good.stderr == "to stderr\\n"
assert good.queue_seconds >= 0 and good.run_seconds >= 0
assert good.unwrap() == {"result": "success"}
assert bad.status == "FAILED" and bad.output is None and "Invalid input" in bad.error and isinstance(bad.exception, ValueError)
try: bad.unwrap()
except ValueError as error: assert "work" in error.remote_traceback
else: raise SystemExit("it did not raise")
print("ok")
"""
    )
    assert result.out.endswith("ok\n")


def test_f05_statuses_are_exactly_six_and_the_reason_stands_beside(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(queue, max_retries=0)
def die(how):
    import os, signal
    if how == "exit": sys.exit(3)
    if how == "_exit": os._exit(4)
    if how == "kill": os.kill(os.getpid(), signal.SIGKILL)
    if how == "segfault": os.kill(os.getpid(), signal.SIGSEGV)
found = []
for how in ("exit", "_exit", "kill", "segfault"):
    out = die(how).result()
    found.append([str(out.status), out.state_reason, out.error])
print(json.dumps([[s.value for s in Status], [s.value for s in Status if s.is_terminal], found]))
"""
    )
    names, terminal, found = result.json
    assert names == ["IN_QUEUE", "IN_PROGRESS", "COMPLETED", "FAILED", "CANCELLED", "TIMED_OUT"]
    assert terminal == names[2:]
    assert [entry[:2] for entry in found] == [["FAILED", "EXITED"], ["FAILED", "WORKER_DIED"], ["FAILED", "WORKER_DIED"], ["FAILED", "WORKER_DIED"]]
    assert "sys.exit(3)" in found[0][2]
    assert "code 4" in found[1][2]
    assert "SIGKILL" in found[2][2]
    assert "SIGSEGV" in found[3][2]


def test_f06_a_load_balanced_call_gives_the_value_or_raises_the_original(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
class Refused(Exception):
    def __init__(self, code, *, hint):
        super().__init__(f"refused with {code}")
        self.code, self.hint = code, hint
calls = 0
@remote(resource_config=direct)
async def inference(data):
    global calls
    calls += 1
    if data.get("bad"):
        try: {}["missing"]
        except KeyError as error: raise Refused(7, hint=["x"]) from error
    return {"prediction": 0.95, "calls": calls}
async def main():
    print(await inference({}))
    try: await inference({"bad": True})
    except Refused as error:
        assert (error.code, error.hint) == (7, ["x"]) and isinstance(error.__cause__, KeyError)
        assert "inference" in error.remote_traceback
    return (await inference({}))["calls"]
print(json.dumps(asyncio.run(main())))
"""
    )
    assert result.json == 3, "no retry: the failing call ran once"


def test_f06_a_busy_pool_waits_fairly_and_then_says_so(bare_host: Host) -> None:
    bare_host.config.write_text("[limits]\npool_busy_seconds = 1\n", encoding="utf-8")
    result = bare_host.start().run(
        HEAD
        + """
one = CpuLiveLoadBalancer(name="one", workersMax=1)
@remote(one)
def hold(seconds):
    time.sleep(seconds)
    return seconds
assert hold(0).result() == 0
blocker, brief = hold(3), hold(0)
try: brief.result()
except PoolBusy as error: print(type(error).__name__, isinstance(error, TimeoutError))
print(blocker.result())
"""
    )
    assert result.out.split() == ["PoolBusy", "True", "3"]
