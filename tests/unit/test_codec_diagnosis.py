"""What cannot be sent is named before anything is sent."""

from __future__ import annotations

import dataclasses
import functools
import pickle
import threading
from collections.abc import Callable
from typing import Any

import pytest

from remoted_client.codec import Code, Encoder, UnpicklableError
from remoted_client.errors import SerializationError

LOCK = threading.Lock()


class Callback:
    def __init__(self, lock: object = None) -> None:
        self.lock = lock


@dataclasses.dataclass
class Config:
    callbacks: list[Callback]
    table: dict[str, object] = dataclasses.field(default_factory=dict)


class Slotted:
    __slots__ = ("handle",)

    def __init__(self, handle: object) -> None:
        self.handle = handle


class Careful:
    def __init__(self, value: object) -> None:
        self.lock, self.value = threading.Lock(), value

    def __getstate__(self) -> object:
        return {"value": self.value}


def script_function(text: str, **names: object) -> Callable[..., Any]:
    """A function as a notebook has it: its globals belong to no module."""
    scope: dict[str, Any] = {"__name__": "notebook", **names}
    exec(text, scope)
    function: Callable[..., Any] = scope["f"]
    return function


def code_error(function: Callable[..., Any]) -> UnpicklableError:
    with pytest.raises(UnpicklableError) as caught:
        Encoder().encode_call_target(function)
    return caught.value


def argument_error(*args: object, code: Code | None = None, **kwargs: object) -> UnpicklableError:
    with pytest.raises(UnpicklableError) as caught:
        Encoder().encode_arguments(args, kwargs, code)
    return caught.value


def test_a_path_leads_to_the_culprit() -> None:
    config = Config([Callback(), Callback(), Callback(threading.Lock())])

    error = argument_error(1, config=config)

    assert error.path == "argument 'config'.callbacks[2].lock"
    assert error.type_name == "_thread.lock"
    assert "cannot pickle" in error.reason
    assert str(error).startswith("cannot send argument 'config'.callbacks[2].lock (_thread.lock): ")


def test_positional_arguments_have_their_names_if_the_function_is_known() -> None:
    code = Encoder().encode_call_target(script_function("def f(x, handler): ..."))

    assert argument_error(1, threading.Lock(), code=code).path == "argument 'handler'"
    assert argument_error(1, threading.Lock()).path == "argument 1"


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": {"b": threading.Lock()}}, "argument 'x'['a']['b']"),
        ((1, [threading.Lock()]), "argument 'x'[1][0]"),
        ({threading.Lock()}, "an item of argument 'x'"),
        (Slotted(threading.Lock()), "argument 'x'.handle"),
        (Careful(threading.Lock()), "argument 'x'.value"),
        (functools.partial(print, threading.Lock()), "argument 'x'.args[0]"),
        (Callback(threading.Lock()).__init__, "argument 'x'.__self__.lock"),  # type: ignore[misc]
        ((each for each in (1,)), "argument 'x'"),
    ],
)
def test_every_kind_of_container_is_searched(value: object, path: str) -> None:
    assert argument_error(x=value).path == path


def test_globals_and_closures_are_named_with_their_function() -> None:
    train = script_function("def f(): return g()\ndef g(): return LOCK", LOCK=LOCK)
    assert code_error(train).path == "global 'LOCK' of function 'g'"

    make = script_function("def f(db):\n    def inner(): return db\n    return inner")
    assert code_error(make(LOCK)).path == "closure variable 'db' of 'f.<locals>.inner'"

    assert code_error(script_function("def f(a, b=LOCK): ...", LOCK=LOCK)).path == "default of 'b' of 'f'"


def test_a_class_with_a_lock_is_named() -> None:
    function = script_function("class C:\n    lock = LOCK\ndef f(): return C()", LOCK=LOCK)

    assert code_error(function).path == "attribute 'lock' of class 'C'"


def test_deep_recursion_is_told_apart() -> None:
    deep: list[object] = []
    for _ in range(100_000):
        deep = [deep]

    error = argument_error(deep=deep)

    assert error.path == "argument 'deep'"
    assert "nested too deeply" in error.reason


def test_the_error_is_a_serialization_error_and_travels() -> None:
    error = argument_error(threading.Lock())

    again = pickle.loads(pickle.dumps(error))

    assert isinstance(error, SerializationError)
    assert isinstance(error, TypeError)
    assert (again.path, again.type_name, again.reason, str(again)) == (
        error.path,
        error.type_name,
        error.reason,
        str(error),
    )
    assert isinstance(error.__cause__, TypeError)
