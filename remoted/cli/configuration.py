"""Settings as TOML: what is in force, and what can be set at all, each with the comment that stands above it where it is defined.

One source: the "#:" lines of ``remoted.config`` and ``remoted.limits``. ``remotectl config`` prints it, ``remotectl install`` writes
it as the first configuration file, in which everything is turned off.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from remoted.config import Config, UserShare
from remoted.config_files import default_limits
from remoted.limits import Limits

_FIELD = re.compile(r"    (\w+): ")
#: How a docstring begins: the name of the table.
_TABLE = re.compile(r"^``.*?``[:,] ?")


def in_force(config: Mapping[str, Any], limits: Mapping[str, Any]) -> Iterator[str]:
    """What the daemon says, without comments."""
    tables = {name: value for name, value in config.items() if isinstance(value, dict)}
    yield from (_line(name, value) for name, value in config.items() if name not in tables)
    for name, table in {**tables, "limits": limits}.items():
        yield from _table(name, table)


def _table(name: str, table: Mapping[str, Any]) -> Iterator[str]:
    inner = {key: value for key, value in table.items() if isinstance(value, dict)}
    yield from ("", f"[{name}]")
    yield from (_line(key, value) for key, value in table.items() if key not in inner)
    for key, value in inner.items():
        yield from _table(f"{name}.{key}", value)


def defaults(is_shared: bool, off: bool = False) -> Iterator[str]:
    """Every setting that there is, explained. ``off``: nothing of it is set."""
    notes = comments(Config)
    for name, field in Config.model_fields.items():
        if name == "limits":
            yield from ("", *_remarks(notes[name]), "[limits]", *_entries(comments(Limits), default_limits(is_shared).values(), {}, off))
        elif isinstance(field.default, BaseModel):
            yield from ("", f"# {_purpose(type(field.default))}", f"[{name}]", *_fields(type(field.default), off))
        else:
            yield from _entries(notes, {name: field.default}, Config.model_fields, off)
        if name == "users":
            yield from ("", f"# {_purpose(UserShare)} A table for each, by name or uid:", "#[users.alice]", *_fields(UserShare, off=True))


def _purpose(kind: type) -> str:
    """Of a table, by its docstring."""
    text = _TABLE.sub("", inspect.getdoc(kind) or "").replace("``", "`")
    return text[:1].upper() + text[1:]


def comments(kind: type) -> dict[str, list[str]]:
    """What stands above each field in the text of the class."""
    found: dict[str, list[str]] = {}
    above: list[str] = []
    for line in inspect.getsource(kind).splitlines():
        if line.startswith("    #:"):
            above.append(line[6:].strip())
        elif named := _FIELD.match(line):
            found[named[1]], above = above, []
    return found


def _fields(kind: type[BaseModel], off: bool) -> Iterator[str]:
    values = {name: field.default for name, field in kind.model_fields.items()}
    return _entries(comments(kind), values, kind.model_fields, off)


def _entries(notes: Mapping[str, list[str]], values: Mapping[str, Any], fields: Mapping[str, FieldInfo], off: bool) -> Iterator[str]:
    """What is off has no space behind its mark: remarks have one. Of what has no default an example is shown."""
    for name, value in values.items():
        yield from _remarks(notes[name])
        if value is None:
            [example, *_] = fields[name].examples or [None]
            yield f"#{name} = {_toml(example)}"
        else:
            yield f"{'#' if off else ''}{name} = {_toml(value)}"


def _remarks(lines: list[str]) -> list[str]:
    return [f"# {line}" for line in lines]


def _line(name: str, value: object) -> str:
    return f"# {name} is not set" if value is None else f"{name} = {_toml(value)}"


def _toml(value: object) -> str:
    """Of what JSON writes, TOML reads all that stands in our settings."""
    return json.dumps(value)
