"""What was read of a log, over the end of the daemon that tells it."""

from __future__ import annotations

from remoted_client import wire
from remoted_client.printed import Bookmark


def piece(data: bytes, behind: int | None = None) -> wire.Frame:
    return wire.Frame({"op": "output", "stream": 1, **({} if behind is None else {"offset": behind})}, data)


def test_c09_who_comes_back_in_the_middle_of_a_long_record_takes_nothing_twice() -> None:
    bookmark = Bookmark()
    assert bookmark.take(piece(b"first", 10)) == b"first"
    assert bookmark.take(piece(b"abc")) == b"abc"
    assert bookmark.come_back() == 10, "records are told whole"
    assert bookmark.take(piece(b"ab")) == b""
    assert bookmark.come_back() == 10, "and once more, with pieces of another length"
    assert bookmark.take(piece(b"abcd")) == b"d"
    assert bookmark.take(piece(b"ef", 21)) == b"ef"
    assert bookmark.take(piece(b"next", 30)) == b"next"
    assert bookmark.come_back() == 30
