"""The names that stand in our pickles; each is an instruction to ``load.Unpickler``, which acts on it.

They are functions only so that pickle can refer to them. A plain ``pickle.loads`` has no namespaces to build
into, so calling one says what to use instead.
"""

from __future__ import annotations

from typing import NoReturn

from .errors import BadPayload


def _outside() -> NoReturn:
    raise BadPayload("cannot read this payload with pickle: use remoted_client.codec.Decoder")


def make_function(*_: object) -> NoReturn:
    """A function in its namespace, without its contents; the one already here if it is known."""
    _outside()


def set_function(*_: object) -> NoReturn:
    """Fill a function that was made just now."""
    _outside()


def make_cell(*_: object) -> NoReturn:
    """A closure cell, shared by every function that has it."""
    _outside()


def make_class(*_: object) -> NoReturn:
    """A class without attributes; the one already here if its tracker id is known."""
    _outside()


def make_enum(*_: object) -> NoReturn:
    """An enum with its members."""
    _outside()


def set_class(*_: object) -> NoReturn:
    """Fill a class that was made just now."""
    _outside()


def known_class(*_: object) -> NoReturn:
    """A class that the other side surely has."""
    _outside()


def known_function(*_: object) -> NoReturn:
    """A function that the other side surely has."""
    _outside()


def sentinel(*_: object) -> NoReturn:
    """An ``object()``: the same one whenever it is named."""
    _outside()


def bind(*_: object) -> NoReturn:
    """Set a global, unless this version of it was set before."""
    _outside()


def namespace_module(*_: object) -> NoReturn:
    """The module object around a namespace."""
    _outside()


def applied(*_: object) -> NoReturn:
    """Nothing: the parts of the state acted while they were read."""
    _outside()
