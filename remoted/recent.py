"""The newest of what each user has said, so many bytes of each: who says more loses only his own."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

_K = TypeVar("_K", bound=Hashable)
_V = TypeVar("_V")


class Recent(Generic[_K, _V]):
    """One user's, the one used last at the end. The newest is kept however large it is."""

    def __init__(self, most_bytes: int, most: int = 1 << 30) -> None:
        self._most_bytes, self._most = most_bytes, most
        self._kept: OrderedDict[_K, tuple[_V, int]] = OrderedDict()
        self._bytes = 0

    def get(self, key: _K) -> _V | None:
        found = self._kept.get(key)
        if found is None:
            return None
        self._kept.move_to_end(key)
        return found[0]

    def add(self, key: _K, value: _V, size: int) -> list[tuple[_K, _V]]:
        """What had to go for it."""
        self.drop(key)
        self._kept[key] = (value, size)
        self._bytes += size
        gone = []
        while (self._bytes > self._most_bytes or len(self._kept) > self._most) and len(self._kept) > 1:
            oldest, (its, its_size) = self._kept.popitem(last=False)
            self._bytes -= its_size
            gone.append((oldest, its))
        return gone

    def drop(self, key: _K) -> None:
        if key in self._kept:
            self._bytes -= self._kept.pop(key)[1]


class Recents(Generic[_K, _V]):
    """Everybody's."""

    def __init__(self, most_bytes: int, most: int = 1 << 30) -> None:
        self._most_bytes, self._most = most_bytes, most
        self._users: dict[int, Recent[_K, _V]] = {}

    def get(self, uid: int, key: _K) -> _V | None:
        own = self._users.get(uid)
        return own.get(key) if own is not None else None

    def add(self, uid: int, key: _K, value: _V, size: int) -> list[tuple[_K, _V]]:
        """What of his had to go for it."""
        return self._users.setdefault(uid, Recent(self._most_bytes, self._most)).add(key, value, size)

    def drop(self, uid: int, key: _K) -> None:
        if uid in self._users:
            self._users[uid].drop(key)
