"""One call inside the worker: from the daemon's RUN to an outcome. Nothing here talks to the channel."""

from __future__ import annotations

import contextlib
import inspect
import json
import resource
import threading
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING, Any

from remoted_client import failure
from remoted_client.codec.errors import UnpicklableError
from remoted_client.command import CommandEnded
from remoted_client.context import RunningCall
from remoted_client.errors import SerializationError

if TYPE_CHECKING:
    from .lease import Lease


class Run:
    """What was asked for. The arguments are bytes, or the descriptor of a file."""

    # What most calls never change stands here: making one costs what is set in it.
    stream: bool = False
    inline: bool = False
    #: Is its outcome kept for the next daemon when none is there?
    is_kept: bool = False
    #: The how manyth call that the daemon gives to this worker; 0 on a lease.
    position: int = 0
    #: Others may run beside it.
    is_concurrent: bool = False
    instance: dict[str, Any] | None = None
    #: Large parts of the arguments, out of band (PEP 574).
    buffers: list[memoryview] | None = None
    #: Why these cannot be had.
    problem: Exception | None = None
    #: The arguments are a pickle of built-in values alone.
    is_plain: bool = False
    #: The arguments are one bytes for the function, which gives bytes: an HTTP request and its answer.
    is_raw: bool = False
    #: Large parts of the result stay in its pickle.
    copies: bool = False
    #: Where it came from and its number there; None when it came from the daemon.
    lease: Lease | None = None
    number: int = 0
    #: For the thread that reads a lease whose calls are run by another one.
    answered: threading.Event | None = None

    def __init__(self, attempt: str, job: str, code: str, modules: str, context: str, arguments: bytes | int, **more: Any) -> None:
        self.attempt, self.job, self.arguments = attempt, job, arguments
        self.code, self.modules, self.context = code, modules, context
        #: What its body's nested calls are told.
        self.running = RunningCall(job, attempt)
        self.__dict__.update(more)


class Outcome:
    """How a call ended. ``kind``: returned, raised, exited, cancelled, stale, unsendable or lost."""

    error_type: str = ""
    message: str = ""
    traceback: str = ""
    exit_code: int | None = None

    def __init__(self, kind: str, value: Any = None, **more: Any) -> None:
        self.kind, self.value = kind, value
        for name, item in more.items():
            setattr(self, name, item)


def returned(value: Any) -> Outcome:
    return Outcome("returned", value)


def raised(error: BaseException, pickles: Callable[[Any], bool], cancelled: bool) -> Outcome:
    """The outcome for an exception that left the body."""
    if type(error) is MemoryError and (limit := resource.getrlimit(resource.RLIMIT_DATA)[0]) != resource.RLIM_INFINITY:
        add_note(error, f"the worker may use {limit / (1 << 30):.3g} GiB, the memory_gb of its config")
    elif isinstance(error, UnpicklableError):
        advice = "return plain data (numbers, text, lists, dicts, arrays) or an object without that part"
        error = SerializationError(f"{error}; {advice}", error.path)
    description = failure.describe(error, pickles)
    first = description["links"][0]
    outcome = Outcome("raised", description, error_type=first["type_name"], message=_with_notes(first["message"], error), traceback=description["traceback"])
    if isinstance(error, SystemExit):
        outcome.kind, outcome.exit_code, outcome.message = "exited", _exit_code(error), _with_notes(_exit_message(error), error)
    if cancelled:
        outcome.kind = "cancelled"
    return outcome


_NOTE = "remoted: "


def add_note(error: BaseException, text: str) -> None:
    """As ``error.add_note``, which Python 3.10 lacks; shown behind its message too."""
    with contextlib.suppress(Exception):  # a class of the user's may refuse attributes
        error.__notes__ = [*getattr(error, "__notes__", ()), _NOTE + text]


def _with_notes(message: str, error: BaseException) -> str:
    notes = [note.removeprefix(_NOTE) for note in getattr(error, "__notes__", ()) if isinstance(note, str) and note.startswith(_NOTE)]
    if not notes:
        return message
    return f"{message} ({'; '.join(notes)})" if message else "; ".join(notes)


def _exit_code(error: SystemExit) -> int:
    """As the interpreter would exit: None is 0, a number is itself, anything else is 1."""
    if error.code is None:
        return 0
    return error.code if isinstance(error.code, int) and abs(error.code) < 1 << 32 else 1


def _exit_message(error: SystemExit) -> str:
    """The interpreter would print what is no number; it is shown here. A command says itself how it ended."""
    if isinstance(error, CommandEnded):
        return error.message
    plain = error.code is None or isinstance(error.code, (int, str))
    return f"the function called sys.exit({'' if error.code is None else repr(error.code) if plain else failure.message_of(error)})"


def shorten(text: str, size: int, keep_end: bool = False) -> str:
    """As much of a text as takes ``size`` bytes of a header: a letter may take up to six there."""
    while len(text) * 6 > size and (actual := len(json.dumps(text, ensure_ascii=False).encode("utf-8", "surrogatepass"))) > size:
        letters = len(text) * size // actual
        text = text[-letters:] if keep_end else text[:letters]
    return text


def as_iterator(value: Any) -> Iterator[Any] | AsyncIterator[Any]:
    """The items of a streaming call. Raises TypeError when the body gave something else."""
    if inspect.isasyncgen(value) or isinstance(value, AsyncIterator):
        return value
    if isinstance(value, Iterator):
        return value
    raise TypeError(f"cannot stream the result: the generator function returned a {type(value).__qualname__}")
