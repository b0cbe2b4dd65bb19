"""A stand-in: the few names of torch that the document's blocks use, with results that a test can compare."""

from __future__ import annotations

from typing import Any

__version__ = "2.1.0"


class device:
    def __init__(self, kind: str) -> None:
        self.kind = kind


class Model:
    """What ``load`` gives; remembers where it came from and what was done to it."""

    def __init__(self, path: str) -> None:
        self.path = path
        self.place = "cpu"

    def to(self, where: device) -> Model:
        self.place = where.kind
        return self

    def eval(self) -> Model:
        return self

    def generate(self, prompt: str) -> str:
        return f"{prompt} by {self.path} on {self.place}"

    def predict(self, data: Any, threshold: float | None = None) -> dict[str, Any]:
        return {"model": self.path, "seen": len(data), "threshold": threshold}

    def __call__(self, data: Any) -> dict[str, Any]:
        return {"model": self.path, "data": data}


def load(path: str) -> Model:
    return Model(path)
