"""Checks a value that somebody wrote, and says what is wrong with it and what to write instead.

Messages read "cannot set <field>: <reason>; give <what is allowed>". A wrong type is a TypeError, a wrong value a
ValueError, an unknown field a TypeError with the nearest known one. The value of an environment variable is never
shown. Called by the configs and the decorator while a script is being read, so it costs nothing until something is
wrong.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum

TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any, TypeGuard, TypeVar

    E = TypeVar("E", bound=Enum)
    T = TypeVar("T")

NAME_LIMIT = 63
REQUIREMENT_LIMIT = 1000
# Above any real amount of workers, seconds or GB, and small enough that nothing downstream overflows.
AMOUNT_LIMIT = 10**9


def closest(word: str, choices: Iterable[str]) -> str | None:
    """Return the choice that `word` is most likely a slip for, or None.

    Example: `closest("worker_max", ["workersMin", "workersMax"]) == "workersMax"`
    """
    from difflib import get_close_matches  # 5 ms, and only a typing error pays it

    plain = {_plain(choice): choice for choice in choices}
    found = get_close_matches(_plain(word), plain, n=1, cutoff=0.65)
    return plain[found[0]] if found else None


def did_you_mean(word: str, choices: Iterable[str]) -> str:
    """Return `"; did you mean 'x'?"`, or nothing where no choice comes near.

    Example: `f"no such field: {word}" + did_you_mean(word, fields)`
    """
    nearest = closest(word, choices)
    return "" if nearest is None else f"; did you mean {nearest!r}?"


def unknown_field(owner: str, word: str, choices: Iterable[str]) -> TypeError:
    """Return the error for a keyword that `owner` does not have."""
    known = sorted(choices)
    hint = did_you_mean(word, known) or f"; its fields are {', '.join(known)}"
    return TypeError(f"cannot make {owner}: it has no field {word!r}{hint}")


def refuse_unknown(
    owner: str, unknown: Mapping[str, object], known: Iterable[str], refused: Mapping[str, str] | None = None
) -> None:
    """Refuse keywords that `owner` does not have; `refused` says why for those of the cloud, unless they are empty."""
    for word, value in unknown.items():
        if refused is None or word not in refused:
            raise unknown_field(owner, word, known)
        if value:
            raise ValueError(f"cannot set {word}: {refused[word]}")


def wrong_type(field: str, value: object, allowed: str) -> TypeError:
    """Return the error for a value of a type that `field` does not take."""
    return TypeError(f"cannot set {field}: its value is of type {_type_name(value)}; give {allowed}")


def bad_value(field: str, value: object, allowed: str) -> ValueError:
    """Return the error for a value of the right type that `field` does not take."""
    shown = repr(value)
    shown = shown if len(shown) <= 80 else f"{shown[:77]}..."
    return ValueError(f"cannot set {field}: {shown} ({_type_name(value)}) is not allowed; give {allowed}")


def check_type(field: str, value: object, kind: type[T], allowed: str) -> T:
    """Return `value` if it is a `kind`."""
    if not isinstance(value, kind):
        raise wrong_type(field, value, allowed)
    return value


def check_int(field: str, value: object, low: int, high: int = AMOUNT_LIMIT) -> int:
    """Return a whole number from `low` to `high`; True and False are not numbers here."""
    allowed = f"an int from {low} to {high}"
    if isinstance(value, bool) or not isinstance(value, int):
        raise wrong_type(field, value, allowed)
    if not low <= value <= high:
        raise bad_value(field, value, allowed)
    return int(value)


def check_amount(field: str, value: object, *, zero: bool = False) -> int | float:
    """Return a number above 0 (or 0 itself, where `zero` allows it); never NaN or infinite."""
    allowed = f"a number {'of 0 or more' if zero else 'above 0'}, up to {AMOUNT_LIMIT}"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise wrong_type(field, value, allowed)
    if not (0 < value <= AMOUNT_LIMIT or (zero and value == 0)):
        raise bad_value(field, value, allowed)
    return value


def check_bool(field: str, value: object) -> bool:
    """Return True or False; nothing else counts as either."""
    return check_type(field, value, bool, "True or False")


def check_text(field: str, value: object, allowed: str, limit: int = 255) -> str:
    """Return a string of 1 to `limit` printable characters that does not begin with a dash or hold a blank.

    Such a string cannot be taken for an option, split in two or garble a terminal, wherever it ends up.
    """
    text = check_type(field, value, str, allowed)
    if not 0 < len(text) <= limit or not text.isprintable() or " " in text or text.startswith("-"):
        raise bad_value(field, text, allowed)
    return str(text)


def check_name(field: str, value: object) -> str:
    """Return a name as it was written: 1 to 63 printable characters that cannot lead to another folder."""
    allowed = f"1 to {NAME_LIMIT} printable characters without '/' and '\\', and no blank at either end"
    name = check_type(field, value, str, f"a str: {allowed}")
    fits = 0 < len(name) <= NAME_LIMIT and name.isprintable() and name == name.strip()
    if not fits or "/" in name or "\\" in name or name in (".", ".."):
        raise bad_value(field, name, allowed)
    return str(name)


def check_member(field: str, value: object, kind: type[E]) -> E:
    """Return the member of `kind` that `value` is or names."""
    known = [str(member.value) for member in kind]
    allowed = f"a {kind.__name__} or one of {', '.join(known)}"
    if not isinstance(value, (str, kind)):
        raise wrong_type(field, value, allowed)
    try:
        return kind(value)
    except ValueError:
        raise bad_value(field, value, allowed + did_you_mean(str(value), known)) from None


def check_modules(field: str, value: object) -> tuple[str, ...]:
    """Return names of modules as in an import, each once."""
    allowed = "names of modules as in an import, such as ['torch', 'numpy.linalg']"
    names = [
        check_type(field, name, str, allowed) for name in check_list(field, [] if value is None else value, allowed)
    ]
    for name in names:
        if not all(part.isidentifier() for part in name.split(".")):
            raise bad_value(field, name, allowed)
    return tuple(dict.fromkeys(names))


def check_list(field: str, value: object, allowed: str) -> tuple[object, ...]:
    """Return the items of a list or tuple; a single string is a list of one."""
    if isinstance(value, str):
        return (value,)
    if not is_list(value):
        raise wrong_type(field, value, allowed)
    return tuple(value)


def check_env(field: str, value: object) -> dict[str, str | None]:
    """Return environment variables; None stands for the caller's own value. Messages show names, never values."""
    allowed = "a dict from str to str, or to None for the caller's own value"
    if not is_mapping(value):
        raise wrong_type(field, value, allowed)
    return dict(_check_variable(field, key, item) for key, item in value.items())


def check_requirements(field: str, value: object) -> tuple[str, ...]:
    """Return requirements of the form `name[extras]==version; marker`, as the daemon takes them."""
    if value is None:
        return ()
    items = check_list(field, value, "a list of strings")
    if not items:
        return ()
    import re  # 2 ms, and only a script with dependencies pays it

    name = r"[A-Za-z0-9](?:[A-Za-z0-9._-]*[A-Za-z0-9])?"
    clause = r"(?:===|==|~=|!=|<=|>=|<|>)\s*[A-Za-z0-9][A-Za-z0-9.*+!_-]*"
    clauses = rf"{clause}(?:\s*,\s*{clause})*"
    form = re.compile(rf"\s*{name}\s*(?:\[[A-Za-z0-9._,\s-]*\])?\s*(?:\({clauses}\)|(?:{clauses})?)\s*(?:;[^;]*[^;\s][^;]*)?")
    return tuple(_check_requirement(f"{field}[{place}]", item, form) for place, item in enumerate(items))


def _check_requirement(field: str, value: object, form: Any) -> str:
    allowed = "a string such as 'numpy==2.*' or 'torch[extra]>=2.4,<3'"
    text = check_type(field, value, str, allowed)
    if form.fullmatch(text) and text.isascii() and text.isprintable() and len(text) <= REQUIREMENT_LIMIT:
        return str(text)
    start = text.lstrip()
    if start.startswith("-"):
        raise bad_value(field, text, f"{allowed}: options of the installer are not taken here")
    if "://" in text or "@" in text or start.startswith((".", "/", "~", "file:")):
        raise bad_value(field, text, f"{allowed}: what a URL or path holds may change; install it in your own environment, which functions see too")
    raise bad_value(field, text, allowed)


def warn(message: str) -> None:
    """Warn at the line of the script that called into this package, however many of our own calls lie between."""
    import sys
    import warnings

    level = 2
    frame = sys._getframe(1)
    while frame.f_back is not None and str(frame.f_globals.get("__name__")).startswith("remoted_client"):
        frame, level = frame.f_back, level + 1
    warnings.warn(message, stacklevel=level)


def is_list(value: object) -> TypeGuard[list[object] | tuple[object, ...]]:
    """Say whether `value` is a list or a tuple."""
    return isinstance(value, (list, tuple))


def is_mapping(value: object) -> TypeGuard[Mapping[object, object]]:
    """Say whether `value` is a dict or behaves like one."""
    return isinstance(value, Mapping)


def _check_variable(field: str, key: object, value: object) -> tuple[str, str | None]:
    name = check_type(f"a name in {field}", key, str, "a str")
    if not name or "=" in name or "\0" in name:  # not shown: what follows a '=' may be the secret itself
        raise ValueError(f"cannot set {field}: a name in it is empty or holds '=' or NUL; give names without them")
    if value is None:
        return name, None
    text = check_type(f"{field}[{name!r}]", value, str, "a str, or None for the caller's own value")
    if "\0" in text:
        raise ValueError(f"cannot set {field}[{name!r}]: its value holds a NUL character; give text without it")
    return str(name), str(text)


def _type_name(value: object) -> str:
    return "None" if value is None else type(value).__name__


def _plain(word: str) -> str:
    return word.replace("_", "").replace("-", "").casefold()
