"""``@batched``, beyond the documents: calls of single items share a batch."""

from __future__ import annotations

import asyncio
import concurrent.futures
from typing import Any

import pytest

from remoted_client import CpuLiveLoadBalancer, batched, remote
from tests.harness import Host
from tests.surface.test_f07_http_routes import HEAD, ask, post, served

SCRIPT = """
batch_sizes = []
many = CpuLiveLoadBalancer(name="many", max_concurrency=16, workersMax=1)
@remote(many)
@batched(max_batch_size=8, wait_ms=60_000)
async def double(xs: list[int]) -> list[int]:
    batch_sizes.append(len(xs))
    return [2 * x for x in xs]
@remote(many)
@batched(max_batch_size=4, wait_ms=60_000)
def upper(texts: list[str]) -> list[str]:
    print("batch of", len(texts))
    return [text.upper() for text in texts]
@remote(many)
async def sizes(): return batch_sizes
"""


def test_batched_calls_of_a_map_share_batches_and_each_gets_its_own_result(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + SCRIPT
        + """
async def main():
    one = await asyncio.gather(*[double(i) for i in range(16)])
    two = await asyncio.gather(*[upper(texts=c) for c in "abcd"])
    return [one, two, sizes().result()]
print(json.dumps(asyncio.run(main())))
"""
    )
    assert result.json == [[2 * i for i in range(16)], ["A", "B", "C", "D"], [8, 8]]
    assert "batch of 4" in result.out


def test_batched_http_requests_share_a_batch_and_the_hints_are_those_of_one_item(daemon: Host) -> None:
    with served(daemon, SCRIPT), concurrent.futures.ThreadPoolExecutor(8) as pool:
        assert [reply.json for reply in pool.map(lambda i: post(daemon, "double", xs=i), range(8))] == [2 * i for i in range(8)]
        assert post(daemon, "sizes").json == [8]
        assert post(daemon, "double", xs=[1]).detail == [(["body", "xs"], "int_type")]
        document = ask(daemon, "GET", "/v1/endpoints/openapi.json").json["paths"]["/upper"]["post"]
        assert document["requestBody"]["content"]["application/json"]["schema"]["properties"] == {"texts": {"type": "string"}}
        assert document["responses"]["200"]["content"]["application/json"]["schema"] == {"type": "string"}


def test_batched_calls_of_several_clients_share_a_batch_of_a_modules_function(daemon: Host) -> None:
    daemon.write(
        "model.py",
        """
from remoted_client import *
@remote(CpuLiveLoadBalancer(name="many", max_concurrency=16, workersMax=1))
@batched(max_batch_size=2, wait_ms=60_000)
async def together(xs: list[int]) -> list[list[int]]: return [[len(xs), x] for x in xs]
""",
    )
    script = daemon.write("client.py", "import sys\nfrom model import together\nprint(together(int(sys.argv[1])).result(timeout=50))")
    processes = [daemon.popen(script, str(i)) for i in range(2)]
    found = [process.communicate(timeout=60) for process in processes]

    assert [out for out, _ in found] == ["[2, 0]\n", "[2, 1]\n"], found


def test_batched_a_call_cancelled_in_a_thread_harms_no_other_and_a_batch_that_hangs_is_ended(daemon: Host) -> None:
    result = daemon.run(
        HEAD
        + """
def batch(xs):
    open("began", "a").write("b")
    while not os.path.exists("go"): time.sleep(0.01)
    return [os.getpid()] * len(xs)
four = CpuLiveLoadBalancer(name="four", max_concurrency=4, workersMax=1)
work = remote(four)(batched(max_batch_size=3, wait_ms=60_000)(batch))
@remote(four, timeout=0.5)
@batched(max_batch_size=2, wait_ms=60_000)
def hang(xs): time.sleep(600)
calls = [work(i) for i in range(3)]
while not os.path.exists("began"): time.sleep(0.01)
calls[0].cancel()
try: calls[0].result()
except JobCancelled: print("cancelled")
open("go", "w").close()
pids = [call.result() for call in calls[1:]]
again = [call.result() for call in [work(i) for i in range(3)]]
assert set(pids) == set(again), "the worker lives"
hung = [hang(1), hang(2)]
for call in hung:
    try: call.result()
    except (JobTimedOut, WorkerLost) as error: print(type(error).__name__)
fresh = [call.result() for call in [work(i) for i in range(3)]]
print(json.dumps([len(set(pids)), set(fresh) != set(pids)]))
"""
    )
    assert result.json == [1, True]
    assert result.out.startswith("cancelled\n")
    assert "JobTimedOut" in result.out


def test_batched_works_with_queue_classes_too(shared_daemon: Host) -> None:
    result = shared_daemon.run(
        HEAD
        + """
@remote(CpuLiveServerless(name="batches", max_concurrency=4, workersMax=1))
@batched(max_batch_size=4, wait_ms=60_000)
async def size(xs): return [len(xs)] * len(xs)
print(json.dumps([job.output for job in size.map(range(4))]))
"""
    )
    assert result.json == [4, 4, 4, 4]


def test_batched_with_remote_gives_a_hint_if_the_config_is_too_small(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.warns(UserWarning, match=r"@batched\(max_batch_size=8\) gets batches of at most 1: give .* max_concurrency=8"):
        remote(CpuLiveLoadBalancer(name="small"))(batched(max_batch_size=8)(_same))


async def test_batched_f_local_shares_batches_on_its_loop() -> None:
    sizes: list[int] = []

    async def double(xs: list[int]) -> list[int]:
        sizes.append(len(xs))
        return [2 * x for x in xs]

    f = remote(CpuLiveLoadBalancer(name="local", max_concurrency=8))(batched(max_batch_size=3, wait_ms=1)(double))

    assert await asyncio.gather(*[f.local(i) for i in range(4)]) == [0, 2, 4, 6]
    assert sizes == [3, 1]
    assert await asyncio.to_thread(lambda: f.local(5).result()) == 10


# -- the queue itself --------------------------------------------------------------------------------------


def _same(xs: list[Any]) -> list[Any]:
    return xs


@pytest.mark.parametrize(("result", "said"), [([1], "it has 1 results, and must have one for each item"), (None, "it is a NoneType"), ("ab", "it is a str"), ({}, "it is a dict")])
async def test_batched_a_wrong_result_is_an_error_of_every_call(result: Any, said: str) -> None:
    @batched(max_batch_size=2, wait_ms=60_000)
    async def wrong(xs: list[int]) -> list[int]:
        return result

    found = await asyncio.gather(wrong(1), wrong(2), return_exceptions=True)
    assert len(found) == 2
    for error in found:
        assert isinstance(error, (TypeError, ValueError))
        assert "batch of 2" in str(error)
        assert said in str(error)


async def test_batched_an_exception_goes_to_every_call_and_one_in_the_list_to_its_own() -> None:
    @batched(max_batch_size=2, wait_ms=60_000)
    def picky(xs: list[int]) -> list[Any]:
        if 0 in xs:
            raise ZeroDivisionError
        return [ValueError(x) if x < 0 else x for x in xs]

    found = await asyncio.gather(picky(0), picky(1), picky(-1), picky(2), return_exceptions=True)
    assert [type(each) for each in found] == [ZeroDivisionError, ZeroDivisionError, ValueError, int]


async def test_batched_a_cancelled_call_harms_no_other() -> None:
    started, go, seen = asyncio.Event(), asyncio.Event(), []

    @batched(max_batch_size=2, wait_ms=60_000)
    async def slow(xs: list[int]) -> list[int]:
        seen.append(list(xs))
        started.set()
        await go.wait()
        return xs

    first, second, waiting, third, fourth = [asyncio.create_task(slow(i)) for i in range(5)]
    await started.wait()
    first.cancel()
    waiting.cancel()
    await asyncio.wait([first, waiting])
    go.set()

    assert await asyncio.gather(second, third, fourth) == [1, 3, 4]
    assert (first.cancelled(), waiting.cancelled()) == (True, True)
    assert seen == [[0, 1], [3, 4]], "one that was cancelled in time is not computed"


async def test_batched_the_last_call_that_leaves_ends_its_batch() -> None:
    started, ended = asyncio.Event(), asyncio.Event()

    @batched(max_batch_size=2, wait_ms=60_000)
    async def endless(xs: list[int]) -> list[int]:
        started.set()
        try:
            await asyncio.Event().wait()
        finally:
            ended.set()
        return xs

    calls = [asyncio.create_task(endless(i)) for i in range(2)]
    await started.wait()
    calls[0].cancel()
    await asyncio.wait(calls[:1])
    assert not ended.is_set()
    calls[1].cancel()
    await asyncio.wait(calls)
    await asyncio.wait_for(ended.wait(), 10)


async def test_batched_the_next_batch_fills_while_one_runs_and_no_two_overlap() -> None:
    inside, sizes, gates = 0, [], [asyncio.Event() for _ in range(2)]
    begun = asyncio.Event()

    @batched(max_batch_size=3, wait_ms=0)
    async def alone(xs: list[int]) -> list[int]:
        nonlocal inside
        inside += 1
        assert inside == 1
        sizes.append(len(xs))
        begun.set()
        await gates[len(sizes) - 1].wait() if len(sizes) <= 2 else None
        inside -= 1
        return xs

    first = asyncio.create_task(alone(0))
    await begun.wait()
    others = [asyncio.create_task(alone(i)) for i in range(1, 6)]
    gates[0].set()
    gates[1].set()

    assert await asyncio.gather(first, *others) == list(range(6))
    assert sizes == [1, 3, 2]


def test_batched_refuses_what_it_cannot_batch() -> None:
    def two(a: list[int], b: list[int]) -> list[int]:
        return a + b

    def generator(xs: list[int]) -> Any:
        yield from xs

    for function, said in ((two, "one parameter"), (generator, "generator"), (lambda *xs: xs, "one parameter"), (len, "def or async def"), (remote(CpuLiveLoadBalancer(name="b"))(_same), "above @batched")):
        with pytest.raises(TypeError, match=said):
            batched(max_batch_size=2)(function)  # type: ignore[arg-type]
    for size, wait in ((0, 1), (10_001, 1), (True, 1), (2.5, 1), (2, -1), (2, float("nan")), (2, 1e9)):
        with pytest.raises((TypeError, ValueError), match=r"max_batch_size|wait_ms"):
            batched(max_batch_size=size, wait_ms=wait)(_same)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="xs"):
        remote(CpuLiveLoadBalancer(name="b", max_concurrency=2))(batched(max_batch_size=2)(_same)).local()  # type: ignore[call-arg]
