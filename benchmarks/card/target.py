"""A process that holds memory of a card and can say whether it is still what it was: ``python target.py LIBRARY``.

Reads lines ``hold BYTES``, ``sum``, ``fraction SHARE``; answers each with a line of JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from typing import Any

_CHUNK = 64 << 20  # elements that are summed up at a time


def torch_holder() -> dict[str, Callable[[str], Any]]:
    import torch

    held: list[Any] = []

    def hold(size: str) -> dict[str, Any]:
        held.clear()
        torch.cuda.empty_cache()
        count = int(size) // 8
        held.append(torch.empty(count, dtype=torch.int64, device="cuda"))
        for at in range(0, count, _CHUNK):
            held[0][at : at + _CHUNK] = torch.arange(at, min(at + _CHUNK, count), device="cuda") * 2654435761 % 1000003
        torch.cuda.empty_cache()
        torch.cuda.synchronize()
        return {"bytes": count * 8}

    def total(_: str) -> dict[str, Any]:
        found = 0
        for at in range(0, len(held[0]), _CHUNK):
            part = held[0][at : at + _CHUNK]
            found += int((part * (torch.arange(len(part), device="cuda") % 97 + 1)).sum().item())
        torch.cuda.empty_cache()
        return {"sum": found}

    def fraction(share: str) -> dict[str, Any]:
        torch.cuda.set_per_process_memory_fraction(float(share))
        size = int(torch.cuda.get_device_properties(0).total_memory * float(share) * 1.1)
        try:
            torch.empty(size, dtype=torch.uint8, device="cuda")
        except torch.cuda.OutOfMemoryError as error:
            return {"error": str(error).splitlines()[0]}
        return {"error": None}

    torch.cuda.init()
    torch.zeros(1, device="cuda")
    return {"hold": hold, "sum": total, "fraction": fraction}


def jax_holder() -> dict[str, Callable[[str], Any]]:
    import jax.numpy as jnp

    held: list[Any] = []

    def hold(size: str) -> dict[str, Any]:
        held[:] = [(jnp.arange(int(size) // 4, dtype=jnp.int32) % 1009).block_until_ready()]
        return {"bytes": int(size)}

    return {"hold": hold, "sum": lambda _: {"sum": int(held[0].sum())}}


def cupy_holder(*, managed: bool = False) -> dict[str, Callable[[str], Any]]:
    import cupy

    if managed:
        cupy.cuda.set_allocator(cupy.cuda.MemoryPool(cupy.cuda.malloc_managed).malloc)
    held: list[Any] = []

    def hold(size: str) -> dict[str, Any]:
        held[:] = [cupy.arange(int(size) // 8) % 1009]
        cupy.cuda.Device().synchronize()
        return {"bytes": int(size)}

    return {"hold": hold, "sum": lambda _: {"sum": int(held[0].sum())}}


HOLDERS: dict[str, Callable[[], dict[str, Callable[[str], Any]]]] = {
    "torch": torch_holder,
    "jax": jax_holder,
    "cupy": cupy_holder,
    "managed": lambda: cupy_holder(managed=True),
}


def main() -> None:
    begin = time.perf_counter()
    answers = HOLDERS[sys.argv[1]]()
    print(json.dumps({"ready_seconds": time.perf_counter() - begin}), flush=True)
    for line in sys.stdin:
        word, _, rest = line.strip().partition(" ")
        print(json.dumps(answers[word](rest)), flush=True)


if __name__ == "__main__":
    main()
