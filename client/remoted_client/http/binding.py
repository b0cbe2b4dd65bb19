"""From JSON values and texts to the parameters of a function, by their type hints.

Strict where JSON has the type: ``"3"`` is no int; 3.0 is one, and 3 is a float. A path and a query hold texts, so there the
text is read. Every problem is collected with its place, in the words of pydantic, which checks its own models itself.
"""

from __future__ import annotations

import datetime
import decimal
import math
import re
import uuid
from collections.abc import Callable
from typing import Any, NamedTuple

from remoted_client.http.hints import Form, adapter_of

Place = tuple["str | int", ...]
_BOOLS = {"true": True, "1": True, "yes": True, "on": True, "false": False, "0": False, "no": False, "off": False}
_INTEGER = re.compile(r"[+-]?[0-9]{1,4000}", re.ASCII)
_FLOAT = re.compile(r"[+-]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,4})?", re.ASCII)


class Problem(NamedTuple):
    """One thing that is wrong with a request; the value itself is never shown: it may be a secret."""

    loc: Place
    msg: str
    type: str


class Invalid(Exception):
    """A request does not fit; ``problems`` holds everything that is wrong."""

    def __init__(self, problems: list[Problem]) -> None:
        super().__init__(f"{len(problems)} problems")
        self.problems = problems


def invalid(place: Place, msg: str, kind: str) -> Invalid:
    return Invalid([Problem(place, msg, kind)])


def convert(value: Any, form: Form, place: Place, is_text: bool = False) -> Any:
    """The value as its hint wants it. ``is_text``: it stood in a path or query. Raises Invalid."""
    return _CONVERTERS[form.kind](value, form, place, is_text)


class Collector:
    """Goes on behind a problem, so that all of them are told at once."""

    def __init__(self) -> None:
        self.problems: list[Problem] = []

    def convert(self, value: Any, form: Form, place: Place, is_text: bool = False) -> Any:
        try:
            return convert(value, form, place, is_text)
        except Invalid as error:
            self.problems += error.problems
            return None

    def add(self, place: Place, msg: str, kind: str) -> None:
        self.problems.append(Problem(place, msg, kind))

    def check(self) -> None:
        """Raises Invalid if there was any problem."""
        if self.problems:
            raise Invalid(self.problems)


# -- one value ---------------------------------------------------------------------------------------------


def _any(value: Any, form: Form, place: Place, is_text: bool) -> Any:
    return value


def _scalar(value: Any, form: Form, place: Place, is_text: bool) -> Any:
    read, what, kind = _READERS[form.target] if form.target in _READERS else _READERS[str]
    try:
        return read(value, is_text)
    except (ValueError, ArithmeticError):
        raise invalid(place, f"Input should be {what}", f"{kind}_parsing" if is_text or kind not in _JSON_TYPES else f"{kind}_type") from None


def _int(value: Any, is_text: bool) -> int:
    if is_text and _INTEGER.fullmatch(value):
        return int(value)
    if type(value) is int or (type(value) is float and value.is_integer()):
        return int(value)
    raise ValueError


def _float(value: Any, is_text: bool) -> float:
    if (is_text and _FLOAT.fullmatch(value)) or type(value) in (int, float):
        number = float(value)
        if math.isfinite(number):
            return number
    raise ValueError


def _bool(value: Any, is_text: bool) -> bool:
    if is_text:
        value = _BOOLS.get(value.lower())
    if type(value) is not bool:
        raise ValueError
    return value


def _str(value: Any, is_text: bool) -> str:
    if type(value) is not str:
        raise ValueError
    return value


def _none(value: Any, is_text: bool) -> None:
    if value is not None:
        raise ValueError


def _seconds(value: Any, is_text: bool) -> datetime.timedelta:
    return datetime.timedelta(seconds=_float(value, is_text))


def _decimal(value: Any, is_text: bool) -> decimal.Decimal:
    if type(value) not in (str, int, float):
        raise ValueError
    number = decimal.Decimal(str(value))
    if not number.is_finite():
        raise ValueError
    return number


def _from_text(make: Callable[[str], Any]) -> Callable[[Any, bool], Any]:
    return lambda value, is_text: make(_str(value, is_text))


def _iso(kind: Any) -> Callable[[Any, bool], Any]:
    """Python 3.10 does not know the Z of UTC."""
    return _from_text(lambda text: kind.fromisoformat(text[:-1] + "+00:00" if text.endswith(("Z", "z")) and kind is not datetime.date else text))


def _path(make: Any) -> Callable[[Any, bool], Any]:
    def read(text: str) -> Any:
        if "\0" in text:
            raise ValueError
        return make(text)

    return _from_text(read)


def _readers() -> dict[Any, tuple[Callable[[Any, bool], Any], str, str]]:
    from pathlib import Path, PurePath

    return {
        int: (_int, "a whole number", "int"),
        float: (_float, "a finite number", "float"),
        bool: (_bool, "true or false", "bool"),
        str: (_str, "a string", "string"),
        type(None): (_none, "null", "none"),
        datetime.datetime: (_iso(datetime.datetime), "a date and time in ISO 8601", "datetime"),
        datetime.date: (_iso(datetime.date), "a date in ISO 8601", "date"),
        datetime.time: (_iso(datetime.time), "a time in ISO 8601", "time"),
        datetime.timedelta: (_seconds, "a duration in seconds", "time_delta"),
        uuid.UUID: (_from_text(uuid.UUID), "a UUID", "uuid"),
        decimal.Decimal: (_decimal, "a decimal number", "decimal"),
        Path: (_path(Path), "a path", "path"),
        PurePath: (_path(PurePath), "a path", "path"),
    }


_READERS = _readers()
_JSON_TYPES = frozenset({"int", "float", "bool", "string", "none"})


def _enum(value: Any, form: Form, place: Place, is_text: bool) -> Any:
    for member in form.choices:
        if _is_choice(value, member.value, is_text):
            return member
    raise invalid(place, f"Input should be {_or([member.value for member in form.choices])}", "enum")


def _literal(value: Any, form: Form, place: Place, is_text: bool) -> Any:
    for choice in form.choices:
        if _is_choice(value, getattr(choice, "value", choice), is_text):
            return choice
    raise invalid(place, f"Input should be {_or(form.choices)}", "literal_error")


def _is_choice(value: Any, choice: Any, is_text: bool) -> bool:
    """1, 1.0 and True are equal and are not the same."""
    return str(choice) == value if is_text else type(value) is type(choice) and value == choice


def _or(choices: Any) -> str:
    words = [repr(choice) for choice in choices]
    return " or ".join([", ".join(words[:-1]), words[-1]] if len(words) > 1 else words)


# -- several -----------------------------------------------------------------------------------------------


def _list(value: Any, form: Form, place: Place, is_text: bool) -> Any:
    items = _items(value, place, form.target)
    collector = Collector()
    found = [collector.convert(item, form.items[0], (*place, number), is_text) for number, item in enumerate(items)]
    collector.check()
    try:
        return form.target(found)
    except TypeError:  # a set of what cannot be in one
        raise invalid(place, f"Input should be a {form.target.__name__} of hashable values", "set_item_not_hashable") from None


def _tuple(value: Any, form: Form, place: Place, is_text: bool) -> Any:
    items = _items(value, place, tuple)
    if len(items) != len(form.items):
        raise invalid(place, f"Input should have {len(form.items)} items, not {len(items)}", "tuple_length")
    collector = Collector()
    found = [collector.convert(item, of, (*place, number), is_text) for number, (item, of) in enumerate(zip(items, form.items, strict=True))]
    collector.check()
    return tuple(found)


def _items(value: Any, place: Place, kind: type) -> list[Any]:
    if not isinstance(value, list):
        raise invalid(place, "Input should be an array", f"{kind.__name__}_type")
    return value


def _mapping(value: Any, form: Form, place: Place, is_text: bool) -> Any:
    collector = Collector()
    of_key, of_value = form.items
    found = {
        collector.convert(key, of_key, (*place, key, "[key]"), is_text=True): collector.convert(item, of_value, (*place, key))
        for key, item in _object(value, place).items()
    }
    collector.check()
    return found


def _record(value: Any, form: Form, place: Place, is_text: bool) -> Any:
    collector = Collector()
    found: dict[str, Any] = {}
    for name, item in _object(value, place).items():
        if name in form.fields:
            found[name] = collector.convert(item, form.fields[name].form, (*place, name))
        else:
            collector.add((*place, name), f"{form.name} has no such field{suggest(name, form.fields)}", "extra_forbidden")
    for name, field in form.fields.items():
        if field.required and name not in found:
            collector.add((*place, name), "Field required", "missing")
    collector.check()
    try:
        return form.target(**found)
    except (ValueError, TypeError, AssertionError) as error:  # what a __post_init__ says
        raise invalid(place, f"{form.name} refuses it: {error}", "value_error") from error


def _object(value: Any, place: Place) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise invalid(place, "Input should be an object", "dict_type")
    return value


def suggest(name: str, known: Any) -> str:
    from remoted_client.suggest import did_you_mean

    return did_you_mean(name, list(known))


def _union(value: Any, form: Form, place: Place, is_text: bool) -> Any:
    """The member that is the value's own type comes first; of an optional one the problems are told as they are."""
    none = type(None)
    members = [member for member in form.items if member.target is not none]
    if value is None and not is_text and len(members) < len(form.items):
        return None
    problems: list[Problem] = []
    for member in members if is_text else sorted(members, key=lambda member: member.target is not type(value)):
        try:
            return convert(value, member, place, is_text)
        except Invalid as error:
            problems = error.problems
    if len(members) == 1:
        raise Invalid(problems)
    raise invalid(place, f"Input should be {' or '.join(member.name for member in form.items)}", "union_error")


def _pydantic(value: Any, form: Form, place: Place, is_text: bool) -> Any:
    adapter = adapter_of(form.target)
    try:
        return adapter.validate_python(value)
    except ValueError as error:
        errors: Any = getattr(error, "errors", None)
        if errors is None:
            raise
        found = errors(include_url=False, include_input=False, include_context=False)
        raise Invalid([Problem((*place, *item["loc"]), item["msg"], item["type"]) for item in found]) from error


_CONVERTERS: dict[str, Callable[[Any, Form, Place, bool], Any]] = {
    "any": _any,
    "scalar": _scalar,
    "enum": _enum,
    "literal": _literal,
    "union": _union,
    "list": _list,
    "set": _list,
    "tuple": _tuple,
    "mapping": _mapping,
    "record": _record,
    "pydantic": _pydantic,
}
