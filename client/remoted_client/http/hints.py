"""Type hints, taken apart: what ``binding`` converts to and ``schema`` describes, so that the two cannot disagree."""

from __future__ import annotations

import collections.abc
import dataclasses
import datetime
import decimal
import functools
import pathlib
import sys
import types
import typing
import uuid
from typing import Any, NamedTuple

#: Hints under which a value stays what it is.
_OPEN = (Any, object)
_LISTS = (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection, collections.abc.MutableSequence)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_SETS = {set: set, collections.abc.Set: set, collections.abc.MutableSet: set, frozenset: frozenset}
#: Written as text in JSON.
TEXTS = (datetime.datetime, datetime.date, datetime.time, uuid.UUID, decimal.Decimal, pathlib.Path, pathlib.PurePath)
SCALARS = (int, float, str, bool, type(None), datetime.timedelta, *TEXTS)


class Form(NamedTuple):
    """One hint. ``kind``: any, scalar, enum, literal, union, list, set, tuple, mapping, record or pydantic."""

    kind: str
    target: Any = None
    #: Hints of items: one for a list; one for each place of a tuple; key and value of a mapping; members of a union.
    items: tuple[Any, ...] = ()


class Field(NamedTuple):
    """One entry of a dataclass or a TypedDict."""

    name: str
    hint: Any
    required: bool


def form_of(hint: Any) -> Form:
    """Raises TypeError for a hint that JSON has no form for."""
    hint = _bare(hint)
    if hint in _OPEN or isinstance(hint, typing.TypeVar):
        return Form("any")
    if is_pydantic(hint):
        return Form("pydantic", hint)
    origin, items = typing.get_origin(hint) or hint, typing.get_args(hint)
    if origin is typing.Literal:
        return Form("literal", hint, items)
    if origin in (typing.Union, types.UnionType):
        return Form("union", hint, items)
    if isinstance(origin, type):
        return _form_of_class(origin, items)
    raise TypeError(f"JSON has no form for the type {name_of(hint)}")


def _form_of_class(origin: type, items: tuple[Any, ...]) -> Form:
    import enum

    if issubclass(origin, enum.Enum):
        return Form("enum", origin)
    if origin in SCALARS:
        return Form("scalar", origin)
    if origin in _LISTS:
        return Form("list", list, items or (Any,))
    if origin in _SETS:
        return Form("set", _SETS[origin], items or (Any,))
    if origin is tuple:
        return _form_of_tuple(items)
    if origin in _MAPPINGS:
        return Form("mapping", dict, items or (Any, Any))
    if dataclasses.is_dataclass(origin) or typing.is_typeddict(origin):
        return Form("record", origin)
    raise TypeError(f"JSON has no form for the type {name_of(origin)}")


def _form_of_tuple(items: tuple[Any, ...]) -> Form:
    if not items:
        return Form("list", tuple, (Any,))
    if len(items) == 2 and items[1] is Ellipsis:
        return Form("list", tuple, (items[0],))
    return Form("tuple", tuple, () if items == ((),) else items)


def _bare(hint: Any) -> Any:
    """Without NewType, aliases and notes that nobody here understands; None means its type."""
    while True:
        if hint is None:
            return type(None)
        if typing.get_origin(hint) is typing.Annotated and not is_pydantic(hint):
            hint = typing.get_args(hint)[0]
        elif hasattr(hint, "__supertype__"):
            hint = hint.__supertype__
        elif type(hint).__name__ == "TypeAliasType":
            hint = hint.__value__
        else:
            return hint


def is_pydantic(hint: Any) -> bool:
    """Models and notes that pydantic understands are pydantic's to check: it is loaded where such a hint exists."""
    pydantic = sys.modules.get("pydantic")
    if pydantic is None or not hasattr(pydantic, "TypeAdapter"):
        return False
    if typing.get_origin(hint) is typing.Annotated:
        return any(type(note).__module__.partition(".")[0] in ("pydantic", "annotated_types") for note in hint.__metadata__)
    return isinstance(hint, type) and (issubclass(hint, pydantic.BaseModel) or hasattr(hint, "__pydantic_validator__"))


@functools.lru_cache(maxsize=256)
def adapter_of(hint: Any) -> Any:
    """pydantic's own reader of a hint."""
    return sys.modules["pydantic"].TypeAdapter(hint)


@functools.lru_cache(maxsize=256)
def fields_of(record: Any) -> tuple[Field, ...]:
    """What a dataclass is made of, or a TypedDict holds. Raises TypeError when its hints cannot be read."""
    hints = read_hints(record)
    if typing.is_typeddict(record):
        return tuple(Field(name, _without_mark(hint), name in record.__required_keys__) for name, hint in hints.items())
    missing = dataclasses.MISSING
    return tuple(
        Field(field.name, hints[field.name], field.default is missing and field.default_factory is missing)
        for field in dataclasses.fields(record)
        if field.init
    )


def _without_mark(hint: Any) -> Any:
    """What Required and NotRequired stand around."""
    return typing.get_args(hint)[0] if getattr(typing.get_origin(hint), "_name", "") in ("Required", "NotRequired") else hint


def read_hints(target: Any) -> dict[str, Any]:
    """The hints of a function or class as types. Raises TypeError when a name in them means nothing."""
    try:
        return typing.get_type_hints(target, include_extras=True)
    except Exception as error:
        raise TypeError(f"cannot read the type hints of {name_of(target)}: {error}") from error


def name_of(hint: Any) -> str:
    """As one writes it."""
    if hint is type(None):
        return "None"
    return str(getattr(hint, "__qualname__", "") if typing.get_origin(hint) is None else "") or str(hint).replace("typing.", "")
