"""A function made ready to be sent."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from .errors import BadPayload
from .modules import ModuleSet

if TYPE_CHECKING:
    from .dump import Known

#: How a payload of code starts; its digest follows.
MAGIC = b"RMC1"
_DIGEST_CHARACTERS = 32


@dataclass(frozen=True, eq=False)
class Code:
    """A function or class, ready to be sent.

    Attributes:
        digest: equal for equal code, captured globals included, within one run of a script.
        payload: what ``Decoder.load_target`` reads.
        modules: the project modules that the worker must have before.
        parameters: names of its positional parameters, for messages.
        known: what a worker that has loaded the payload has.
    """

    digest: str
    payload: bytes = field(repr=False)
    modules: ModuleSet = field(repr=False)
    parameters: tuple[str, ...] = ()
    known: Known | None = field(default=None, repr=False)


def split(payload: bytes | bytearray | memoryview) -> tuple[str, memoryview]:
    """The digest of a payload of code, and the rest of it."""
    view = memoryview(payload)
    end = len(MAGIC) + _DIGEST_CHARACTERS
    if bytes(view[: len(MAGIC)]) != MAGIC:
        raise BadPayload("cannot read this code: it was made by another version of remoted_client")
    return str(view[len(MAGIC) : end], "ascii"), view[end:]
