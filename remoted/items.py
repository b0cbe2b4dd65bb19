"""The items of one stream, told one after another. One that the store does not take at once is stored behind later ones (``keeping``)."""

from __future__ import annotations

from collections.abc import Iterable

from remoted.attempts import Content
from remoted.errors import RemotedError


class Items(list[Content]):
    """In order; begins with those that an earlier daemon has stored."""

    #: Why one found no room: no other is taken.
    problem: RemotedError | None = None

    def __init__(self, stored: Iterable[Content] = ()) -> None:
        super().__init__(stored)
        #: Of those that are rows; the others are files.
        self.inline_bytes = sum(len(item.inline or b"") for item in self)
        self._unstored: set[int] = set()
        self._told = len(self)

    @property
    def unstored(self) -> int:
        """How many are on their way to the disk."""
        return len(self._unstored)

    def add(self, content: Content) -> None:
        """It is on its way to the disk."""
        self._unstored.add(len(self))
        self.append(content)
        self.inline_bytes += len(content.inline or b"")

    def stored(self, number: int) -> list[tuple[int, Content]]:
        """Which may be told now that this one is stored."""
        self._unstored.discard(number)
        first = self._told
        self._told = min(self._unstored, default=len(self))
        return self._numbered(first)

    def told_from(self, number: int) -> list[tuple[int, Content]]:
        """Those that have been told already, for one who has seen all before ``number``."""
        return self._numbered(number)

    def _numbered(self, first: int) -> list[tuple[int, Content]]:
        return [(number, self[number]) for number in range(max(0, first), self._told)]
