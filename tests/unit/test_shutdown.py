"""C09: what systemd says of a host that goes down."""

from __future__ import annotations

import pytest

from remoted.spawn.shutdown import says_so


@pytest.mark.parametrize("text", ["Job=1234\nActiveState=inactive\n", "ActiveState=active\n", "ActiveState=active\nJob=7\n"])
def test_c09_a_shutdown_that_waits_or_runs_is_one(text: str) -> None:
    assert says_so(text)


@pytest.mark.parametrize("text", ["", "Job=\nActiveState=inactive\n", "Job=0\nActiveState=inactive\n", "ActiveState=inactive\n", "Failed to connect to bus\n"])
def test_c09_anything_else_is_none(text: str) -> None:
    assert not says_so(text)
