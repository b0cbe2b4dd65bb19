"""What is remembered of a function between two calls of it."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

from remoted_client import CpuLiveServerless, remote, submission
from remoted_client.codec import Encoder


def f() -> int:
    return 1


def test_f08_a_config_that_has_the_id_of_one_that_is_gone_is_another_one() -> None:
    """Objects that are made and dropped in a loop lie in the same place again and again."""
    line: Any = SimpleNamespace(encoder=Encoder())
    for number in range(500):
        function: Any = remote(CpuLiveServerless(name=f"pool-{number}"))(f)
        described = submission._describe(line, f, function._settings, False)
        assert f'"pool-{number}"' in described.pool_key
