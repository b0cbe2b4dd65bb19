"""Type hints, taken apart: what ``binding`` converts to and ``schema`` describes, so that the two cannot disagree."""

from __future__ import annotations

import collections.abc
import dataclasses
import datetime
import decimal
import enum
import functools
import pathlib
import sys
import types
import typing
import uuid
from typing import Any

#: Hints under which a value stays what it is.
_OPEN = (Any, object)
_LISTS = (list, collections.abc.Sequence, collections.abc.Iterable, collections.abc.Collection, collections.abc.MutableSequence)
_MAPPINGS = (dict, collections.abc.Mapping, collections.abc.MutableMapping)
_SETS = {set: set, collections.abc.Set: set, collections.abc.MutableSet: set, frozenset: frozenset}
#: Written as text in JSON.
TEXTS = (datetime.datetime, datetime.date, datetime.time, uuid.UUID, decimal.Decimal, pathlib.Path, pathlib.PurePath)
SCALARS = (int, float, str, bool, type(None), datetime.timedelta, *TEXTS)


@dataclasses.dataclass(eq=False)
class Form:
    """One hint, resolved to its last name: in the worker the names in it may mean nothing.

    ``kind``: any, scalar, enum, literal, union, list, set, tuple, mapping, record or pydantic.
    """

    kind: str
    target: Any = None
    #: Of the items of a list; of each place of a tuple; of key and value of a mapping; of the members of a union.
    items: list[Form] = dataclasses.field(default_factory=list)
    choices: tuple[Any, ...] = ()
    #: A record's, which may hold records of its own kind.
    fields: dict[str, Field] = dataclasses.field(default_factory=dict)
    name: str = ""


@dataclasses.dataclass(eq=False)
class Field:
    """One entry of a dataclass or a TypedDict."""

    form: Form
    required: bool


_Records = dict[Any, Form]


def form_of(hint: Any, records: _Records | None = None) -> Form:
    """Raises TypeError for a hint that JSON has no form for. ``records``: those that are being taken apart."""
    hint, records = _bare(hint), {} if records is None else records
    if hint in _OPEN or isinstance(hint, typing.TypeVar):
        return Form("any")
    origin, items = typing.get_origin(hint) or hint, typing.get_args(hint)
    if is_pydantic(hint):
        form = Form("pydantic", hint)
    elif origin is typing.Literal:
        form = Form("literal", choices=items)
    elif origin in (typing.Union, types.UnionType):
        form = Form("union", items=[form_of(item, records) for item in items])
    elif isinstance(origin, type):
        form = _form_of_class(origin, items, records)
    else:
        raise TypeError(f"JSON has no form for the type {name_of(hint)}")
    form.name = name_of(hint)
    return form


def _form_of_class(origin: type, items: tuple[Any, ...], records: _Records) -> Form:
    if issubclass(origin, enum.Enum):
        return Form("enum", origin, choices=tuple(origin))
    if origin in SCALARS:
        return Form("scalar", origin)
    if origin in _LISTS:
        return Form("list", list, _forms(items or (Any,), records))
    if origin in _SETS:
        return Form("set", _SETS[origin], _forms(items or (Any,), records))
    if origin is tuple:
        return _form_of_tuple(items, records)
    if origin in _MAPPINGS:
        return Form("mapping", dict, _forms(items or (Any, Any), records))
    if dataclasses.is_dataclass(origin) or typing.is_typeddict(origin):
        return _form_of_record(origin, records)
    raise TypeError(f"JSON has no form for the type {name_of(origin)}")


def _forms(hints: tuple[Any, ...], records: _Records) -> list[Form]:
    return [form_of(hint, records) for hint in hints]


def _form_of_tuple(items: tuple[Any, ...], records: _Records) -> Form:
    if not items or (len(items) == 2 and items[1] is Ellipsis):
        return Form("list", tuple, _forms(items[:1] or (Any,), records))
    return Form("tuple", tuple, _forms(() if items == ((),) else items, records))


def _form_of_record(record: Any, records: _Records) -> Form:
    if record in records:
        return records[record]
    form = records[record] = Form("record", record)
    hints = read_hints(record)
    if typing.is_typeddict(record):
        form.fields = {name: _entry(hint, name in record.__required_keys__, records) for name, hint in hints.items()}
    else:
        own = [field for field in dataclasses.fields(record) if field.init]
        form.fields = {field.name: Field(form_of(hints[field.name], records), _is_required(field)) for field in own}
    return form


def _entry(hint: Any, required: bool, records: _Records) -> Field:
    """Required and NotRequired are believed first: of annotations that are texts the class itself has not seen them."""
    mark = getattr(typing.get_origin(hint), "_name", "")
    if mark in ("Required", "NotRequired"):
        hint, required = typing.get_args(hint)[0], mark == "Required"
    return Field(form_of(hint, records), required)


def _is_required(field: dataclasses.Field[Any]) -> bool:
    return field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING


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


def read_hints(target: Any) -> dict[str, Any]:
    """The hints of a function or class as types. Raises TypeError when a name in them means nothing."""
    batch = getattr(target, "batch_function", None)
    if batch is not None:  # of @batched: lists there, single items here
        return {name: (typing.get_args(hint) or (Any,))[0] for name, hint in read_hints(batch).items()}
    try:
        return typing.get_type_hints(target, include_extras=True)
    except Exception as error:
        raise TypeError(f"cannot read the type hints of {name_of(target)}: {error}") from error


def name_of(hint: Any) -> str:
    """As one writes it."""
    if hint is type(None):
        return "None"
    return str(getattr(hint, "__qualname__", "") if typing.get_origin(hint) is None else "") or str(hint).replace("typing.", "")
