"""A submission as it came from a client."""

from __future__ import annotations

from typing import NamedTuple

from remoted.access import Identity
from remoted.spec import Options


class Request(NamedTuple):
    """One call, content by digest. A tuple: of a map thousands are made that differ in key and arguments only."""

    key: str
    spec: str
    code: str
    modules: str
    context: str
    arguments: str
    arguments_inline: bytes | None
    options: Options
    parent: str = ""
    instance: tuple[str, str, str] | None = None
    """(instance id, method, digest of the constructor's arguments)"""
    #: Arguments, result and items are bytes for the function itself, not pickles.
    is_raw: bool = False
    #: The arguments are built-in values alone; not known any more of a job from before a restart, and of no consequence.
    is_plain: bool = False
    #: As whom its attempts run, where the daemon can become somebody else.
    identity: Identity | None = None

    def of_call(self, key: str, arguments: bytes | None) -> Request:
        """The same for another call. As ``_replace``, in a quarter of the time."""
        common = (self.spec, self.code, self.modules, self.context, self.arguments)
        return Request(key, *common, arguments, self.options, self.parent, self.instance, self.is_raw, self.is_plain, self.identity)

    @property
    def digests(self) -> tuple[str, ...]:
        """All content that it refers to."""
        usual = (self.spec, self.code, self.context)
        if not self.modules and not self.arguments and self.instance is None:
            return usual
        constructor = self.instance[2] if self.instance else ""
        return usual + tuple(digest for digest in (self.modules, self.arguments, constructor) if digest)
