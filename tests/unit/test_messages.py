"""What calls of one connection have in common is parsed once, and is never somebody else's."""

from __future__ import annotations

from typing import Any

import pytest

from remoted.data.messages import SubmissionParser
from remoted.errors import BadRequest
from remoted_client import wire

COMMON: dict[str, Any] = {"op": "submit", "spec": "s" * 64, "code": "c" * 64, "modules": "", "context": "x" * 64, "arguments": "", "options": {}, "parent": "", "plain": True, "fresh": True}


def frame_of(key: str = "k" * 32, body: bytes = b"", **changed: Any) -> wire.Frame:
    header = {**COMMON, **changed, "calls": [key], "sizes": [len(body)]}
    return wire.Frame(wire.parse_header(wire.encode_header(header)), body)


def test_calls_that_differ_in_key_and_arguments_have_one_request() -> None:
    parser = SubmissionParser()
    first, second, again = parser.parse(frame_of("1" * 32, b"a")), parser.parse(frame_of("2" * 32, b"bb")), parser.parse(frame_of("2" * 32, b"bb", fresh=False))

    assert second.common is first.common
    assert again.common is first.common
    assert (first.calls, second.calls) == ([("1" * 32, b"a")], [("2" * 32, b"bb")])


@pytest.mark.parametrize(
    ("changed", "differs"),
    [
        ({"code": "d" * 64}, "code"),
        ({"context": "y" * 64}, "context"),
        ({"options": {"priority": 3}}, "options"),
        ({"parent": "0" * 32}, "parent"),
        ({"plain": False}, "is_plain"),
        ({"instance": ["i" * 32, "up", "n" * 64]}, "instance"),
        ({"arguments": "a" * 64}, "arguments"),
    ],
)
def test_whatever_else_differs_is_another_request(changed: dict[str, Any], differs: str) -> None:
    parser = SubmissionParser()
    first = parser.parse(frame_of()).common
    other = parser.parse(frame_of(**changed)).common

    assert getattr(other, differs) != getattr(first, differs)
    assert other == SubmissionParser().parse(frame_of(**changed)).common
    assert parser.parse(frame_of()).common == first


def test_a_frame_that_cannot_be_read_leaves_nothing_behind() -> None:
    parser = SubmissionParser()
    first = parser.parse(frame_of()).common
    for bad in ({"options": {"priority": 1000}}, {"parent": "\u00e4"}, {"instance": [1, 2]}):
        for _ in range(2):
            with pytest.raises((BadRequest, TypeError)):
                parser.parse(frame_of(**bad))
    assert parser.parse(frame_of()).common is first


def test_t18_a_large_header_is_not_kept() -> None:
    """There are as many as connections."""
    parser = SubmissionParser()
    for padding in ({"spec": "s" * 30_000}, {"more": "x" * 30_000}, {"options": {"name": "n" * 200}, "more": list(range(2000))}):
        assert parser.parse(frame_of(**padding)).common is not parser.parse(frame_of(**padding)).common
