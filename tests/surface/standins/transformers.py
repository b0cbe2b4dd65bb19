"""A stand-in: ``pipeline`` says what it was asked."""

from __future__ import annotations

from collections.abc import Callable

__version__ = "4.30.2"


def pipeline(task: str) -> Callable[[str], str]:
    return lambda prompt: f"{task}: {prompt}"
