"""The items of one stream, told one after another. One that the store does not take at once is stored behind later ones (``keeping``)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from remoted.attempts import Content
from remoted.errors import RemotedError


class Items:
    """In order; begins with those that an earlier daemon has stored."""

    def __init__(self, stored: Iterable[Content] = ()) -> None:
        self._contents = list(stored)
        self._unstored: set[int] = set()
        self._told = len(self._contents)
        #: Why one found no room: no other is taken.
        self.problem: RemotedError | None = None

    def __len__(self) -> int:
        return len(self._contents)

    def __iter__(self) -> Iterator[Content]:
        return iter(self._contents)

    def add(self, content: Content) -> None:
        """It is on its way to the disk."""
        self._unstored.add(len(self._contents))
        self._contents.append(content)

    def stored(self, number: int) -> list[tuple[int, Content]]:
        """Which may be told now that this one is stored."""
        self._unstored.discard(number)
        first = self._told
        self._told = min(self._unstored, default=len(self._contents))
        return self._numbered(first)

    def told_from(self, number: int) -> list[tuple[int, Content]]:
        """Those that have been told already, for one who has seen all before ``number``."""
        return self._numbered(number)

    def _numbered(self, first: int) -> list[tuple[int, Content]]:
        return [(number, self._contents[number]) for number in range(max(0, first), self._told)]
