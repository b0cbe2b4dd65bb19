"""What a type checker sees of the public names. Never run: mypy and pyright check it (``test_f02_typing``)."""

from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from typing import assert_type

from remoted_client import CpuLiveLoadBalancer, CpuLiveServerless, Handle, JobOutput, StreamHandle, batched, remote
from remoted_client.mapping import MapResult

queue = CpuLiveServerless(name="queue")
direct = CpuLiveLoadBalancer(name="direct")


@remote(resource_config=queue)
async def coroutine(x: int, *, flag: bool = False) -> str:
    return str(x)


@remote(queue, dependencies=["numpy"], timeout=60)
def plain(x: int) -> list[int]:
    return [x]


@remote(direct)
async def direct_coroutine(x: int) -> float:
    return float(x)


@remote(direct, method="POST", path="/x")
def direct_plain(x: int) -> bytes:
    return bytes(x)


@remote(queue)
def generator(n: int) -> Iterator[int]:
    yield n


@remote(direct)
async def async_generator(n: int) -> AsyncIterator[str]:
    yield str(n)


@remote(direct)
@batched(max_batch_size=8)
async def one_by_one(texts: list[str]) -> list[int]:
    return [len(text) for text in texts]


@remote(direct)
@batched(max_batch_size=8, wait_ms=2.5)
def plain_one_by_one(texts: list[str]) -> list[int]:
    return [len(text) for text in texts]


async def use() -> None:
    assert_type(coroutine(1, flag=True), Handle[JobOutput[str]])
    assert_type(await coroutine(1), JobOutput[str])
    assert_type((await coroutine(1)).output, str | None)
    assert_type((await coroutine(1)).unwrap(), str)
    assert_type(plain(1).result(timeout=3), JobOutput[list[int]])
    assert_type(await direct_coroutine(1), float)
    assert_type(direct_plain(1).result(), bytes)
    assert_type(direct_plain.local(1), Handle[bytes])
    assert_type(generator(3), StreamHandle[JobOutput[list[int]]])
    assert_type(await async_generator(3), list[str])
    assert_type(await one_by_one("a"), int)
    assert_type(plain_one_by_one("a").result(), int)
    assert_type(plain.options(timeout=5)(1), Handle[JobOutput[list[int]]])


    assert_type(generator.local(3), StreamHandle[JobOutput[list[int]]])
    assert_type(coroutine.local(1).result().unwrap(), str)
    assert_type(coroutine.map([1], return_exceptions=True), MapResult[JobOutput[str]])
    assert_type(direct_plain.options(timeout=5).starmap([(1,)]), MapResult[bytes])
    assert_type(generator.map([1]), MapResult[JobOutput[list[int]]])
    assert_type(next(direct_coroutine.map([1])), float)
    assert_type(next(generator(3)), int)
    for item in generator(3):
        assert_type(item, int)
    async for text in async_generator(3):
        assert_type(text, str)
    async for number in direct_coroutine.map([1]):
        assert_type(number, float)


def misuse() -> None:
    coroutine("one")  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    one_by_one(3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
    plain()  # type: ignore[call-arg]  # pyright: ignore[reportCallIssue]
    CpuLiveServerless(name="x", wokersMax=3)  # type: ignore[arg-type]  # pyright: ignore[reportArgumentType]
