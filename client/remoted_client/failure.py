"""Exceptions that come home as themselves: type, attributes, cause, context, notes and the remote traceback.

Pickle alone loses ``__cause__`` and breaks on every class whose ``__init__`` takes other arguments than its
``args``. So an exception travels as a flat description of its whole chain, and each link is tried three ways:
as pickle would, rebuilt without calling ``__init__``, and at last as ``RemoteExecutionError`` that says why.
The members of an exception group are links too, and it is made of them again: ``except*`` finds what was raised.
"""

from __future__ import annotations

import builtins
import contextlib
import traceback
from collections.abc import Callable
from typing import Any

from remoted_client.errors import RemoteExecutionError, RemoteTraceback

#: A cause's cause's cause ... is cut here,
CHAIN_LENGTH = 32
#: and so much is told of a group of very many.
GROUP_LENGTH = 1000
#: Python 3.10 has none.
_GROUP: Any = getattr(builtins, "BaseExceptionGroup", ())


def describe(error: BaseException, pickles: Callable[[Any], bool]) -> dict[str, Any]:
    """A picklable description of ``error`` and its chain. ``pickles`` says whether a value survives the way home."""
    text = "".join(traceback.format_exception(type(error), error, _without_runtime(error)))
    return {"links": _links(error, pickles), "traceback": text}


def _without_runtime(error: BaseException) -> Any:
    """The traceback from the user's first frame on: our own frames above it help nobody."""
    entry = error.__traceback__
    while entry is not None and entry.tb_frame.f_globals.get("__name__", "").startswith(("remoted_worker", "remoted.worker", "remoted_client.http.", "asyncio.")):
        entry = entry.tb_next
    return entry if entry is not None else error.__traceback__


def _links(error: BaseException, pickles: Callable[[Any], bool]) -> list[dict[str, Any]]:
    """The chain as a list; a link names its cause, context and members by position."""
    order = _members_first(error)
    pending = [(other, 1) for link in order for other in _behind(link)]
    known = {id(link) for link in order}
    while pending and len(order) < GROUP_LENGTH:
        link, depth = pending.pop(0)
        if id(link) in known or depth >= CHAIN_LENGTH:
            continue
        known.add(id(link))
        order.append(link)
        pending += [(other, depth + 1) for other in (*_members(link), *_behind(link))]
    places = {id(link): place for place, link in enumerate(order)}
    return [{**_describe_one(link, pickles), **_relations(link, places)} for link in order]


def _members_first(error: BaseException) -> list[BaseException]:
    """A group with its groups' groups' members: they are what was raised, and go before why each was."""
    order, known = [error], {id(error)}
    for link in order:
        for member in _members(link):
            if id(member) not in known and len(order) < GROUP_LENGTH:
                known.add(id(member))
                order.append(member)
    return order


def _members(error: Any) -> tuple[BaseException, ...]:
    return error.exceptions if isinstance(error, _GROUP) else ()


def _behind(error: BaseException) -> list[BaseException]:
    return [other for other in (error.__cause__, error.__context__) if other is not None]


def _relations(link: BaseException, places: dict[int, int]) -> dict[str, Any]:
    return {
        "cause": places.get(id(link.__cause__)),
        "context": places.get(id(link.__context__)),
        "suppress": link.__suppress_context__,
        "members": [places[id(member)] for member in _members(link) if id(member) in places],
    }


def _describe_one(error: BaseException, pickles: Callable[[Any], bool]) -> dict[str, Any]:
    kind = type(error)
    plain = {"type_name": f"{kind.__module__}.{kind.__qualname__}", "message": message_of(error)}
    # BaseException.__reduce__ gives (type, args, __dict__); a class of the user's may say otherwise.
    is_group = isinstance(error, _GROUP)
    if not is_group and pickles(error):
        return {**plain, "how": "whole", "value": error}
    attributes = {name: value for name, value in vars(error).items() if pickles(value)}
    if is_group:
        return {**plain, **_describe_group(error, attributes, pickles)}
    bare = {"how": "rebuilt", "kind": kind, "args": error.args, "attributes": attributes}
    if pickles(bare) and _can_rebuild(bare):
        return {**plain, **bare}
    return {**plain, "how": "described", "why": _why_not(error, pickles)}


def _describe_group(error: Any, attributes: dict[str, Any], pickles: Callable[[Any], bool]) -> dict[str, Any]:
    """Its own class if that can be sent; ``except*`` cares for the members."""
    kind = type(error) if pickles(type(error)) else _GROUP
    return {"how": "group", "kind": kind, "text": error.message, "attributes": attributes, "why": "it is an exception group"}


def message_of(error: BaseException) -> str:
    """Its text, whatever its class does."""
    try:
        return str(error)
    except Exception as problem:
        return f"<str() of it raised {type(problem).__name__}>"


def _can_rebuild(bare: dict[str, Any]) -> bool:
    try:
        return type(_rebuild(bare)) is bare["kind"]
    except Exception:
        return False


def _rebuild(link: dict[str, Any]) -> BaseException:
    kind: type[BaseException] = link["kind"]
    error = kind.__new__(kind, *link["args"])
    error.args = link["args"]
    error.__dict__.update(link["attributes"])
    return error


def _why_not(error: BaseException, pickles: Callable[[Any], bool]) -> str:
    if not pickles(type(error)):
        return f"its class {type(error).__qualname__} cannot be sent"
    for place, value in enumerate(error.args):
        if not pickles(value):
            return f"its argument {place}, a {type(value).__qualname__}, cannot be sent"
    return "it cannot be rebuilt from its arguments"


def restore(description: dict[str, Any]) -> BaseException:
    """The exception that ``describe`` described, with its chain and ``remote_traceback`` attribute."""
    errors = _restore_all(description["links"])
    for error, link in zip(errors, description["links"], strict=True):
        error.__cause__ = errors[link["cause"]] if link["cause"] is not None else None
        error.__context__ = errors[link["context"]] if link["context"] is not None else None
        error.__suppress_context__ = link["suppress"]
    return attach_traceback(errors[0], description["traceback"])


def _restore_all(links: list[dict[str, Any]]) -> list[BaseException]:
    """Members before their groups, which cannot get them later. No group is its own member's member."""
    made: dict[int, BaseException] = {}
    while len(made) < len(links):
        for place in reversed(range(len(links))):
            members = links[place].get("members", ())
            if place not in made and all(member in made for member in members):
                made[place] = _restore_one(links[place], [made[member] for member in members])
    return [made[place] for place in range(len(links))]


def attach_traceback(error: BaseException, text: str) -> BaseException:
    """Show the remote traceback where Python prints causes: at the far end of the chain of causes."""
    last, seen = error, {id(error)}
    while last.__cause__ is not None and id(last.__cause__) not in seen:
        last = last.__cause__
        seen.add(id(last))
    if last.__cause__ is None:
        last.__cause__ = RemoteTraceback(text)
    with contextlib.suppress(AttributeError):  # an exception without a __dict__
        error.remote_traceback = text  # type: ignore[attr-defined]
    return error


def _restore_one(link: dict[str, Any], members: list[BaseException]) -> BaseException:
    if link["how"] == "whole":
        value: BaseException = link["value"]
        return value
    if link["how"] == "rebuilt":
        return _rebuild(link)
    if link["how"] == "group" and members:
        return _regroup(link, members)
    return RemoteExecutionError(link["message"], exception_type=link["type_name"], why=link["why"])


def _regroup(link: dict[str, Any], members: list[BaseException]) -> BaseException:
    """Not by its class's own ``__new__``, which may take other arguments."""
    try:
        group: BaseException = _GROUP.__new__(link["kind"], link["text"], members)
    except TypeError:  # a class for Exceptions only, and one of the members came as something else
        group = _GROUP(link["text"], members)
    group.__dict__.update(link["attributes"])
    return group
