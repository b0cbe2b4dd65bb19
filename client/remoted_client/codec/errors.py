"""What the codec raises: a value that cannot travel, code that is out of date, bytes that are not ours."""

from __future__ import annotations

from remoted_client.errors import RemotedError, SerializationError


class UnpicklableError(SerializationError):
    """A value that cannot be sent.

    Attributes:
        path: where it is, e.g. ``argument 'config'.callbacks[2].lock``.
        type_name: full name of its type.
        reason: what pickle said.
    """

    def __init__(self, path: str, type_name: str, reason: str) -> None:
        super().__init__(f"cannot send {path} ({type_name}): {reason}", path)
        self.type_name = type_name
        self.reason = reason

    def __reduce__(self) -> tuple[type[UnpicklableError], tuple[str, str, str]]:
        return type(self), (self.path, self.type_name, self.reason)


class StaleModules(RemotedError):
    """Project modules are loaded in this process from another text; only a new process can run the new one."""

    def __init__(self, names: tuple[str, ...]) -> None:
        super().__init__(f"cannot load the caller's code: other versions are imported already: {', '.join(names)}")
        self.names = names

    def __reduce__(self) -> tuple[type[StaleModules], tuple[tuple[str, ...]]]:
        return type(self), (self.names,)


class BadPayload(RemotedError):
    """Bytes that this codec did not make, or that name an object which is not there."""
