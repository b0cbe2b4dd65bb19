"""What is called: the same functions for us and for every peer. Imports nothing, so that a cold start pays for nothing of ours."""

from __future__ import annotations

from typing import Any


def noop() -> None:
    """The smallest call."""


def same(item: Any) -> Any:
    """A no-op with an argument, for maps and for large values: there and back."""
    return item


class Same:
    """An instance whose method is the smallest call."""

    def noop(self) -> None: ...


def numpy_version() -> str:
    """A body whose own import is what a preloaded worker saves."""
    import numpy

    return str(numpy.__version__)
