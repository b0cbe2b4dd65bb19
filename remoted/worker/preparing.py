"""From what the daemon or a client sent to a callable with its arguments, in its caller's surroundings."""

from __future__ import annotations

import _thread
import contextlib
import json
import os
import sys
import time
from typing import Any, NamedTuple

from remoted_client import codec, parcel, plain
from remoted_client.codec.installed import finder
from remoted_client.settings import is_async

from .calls import Instances, Run
from .context import CallContext

_NOTHING = contextlib.nullcontext()
#: Together the tenth of a second in which an edit of what came from disk may go unseen.
_MODULES_SECONDS = 0.05
_READY_SECONDS = 0.05
#: The one that reads the channel. A body that has left a thread behind has left somebody who can change things.
_OWN_THREADS = 1
#: What the worker itself puts into the environment of every call.
_OWN_VARIABLES = ("REMOTED_SOCKET", "REMOTED_WORKER_ID", "REMOTED_PYTHON", "CUDA_VISIBLE_DEVICES")


class Bound:
    """A call with its arguments, ready to be made once."""

    def __init__(self, function: Any, is_async: bool, args: Any, kwargs: Any) -> None:
        self._function = function
        self.is_async = is_async
        self._args, self._kwargs = args, kwargs

    def __call__(self) -> Any:
        args, kwargs = self._args, self._kwargs
        self._args, self._kwargs = (), {}  # gigabytes of arguments must not outlive the body's own use
        return self._function(*args, **kwargs)


class _Ready(NamedTuple):
    """What was put in place for a call that is probably like the last one, and until when it can be relied on."""

    context: str
    modules: str
    code: str
    target: Any
    is_async: bool
    until: float


class Preparer:
    """Everything that this worker has been taught: code, modules, surroundings, instances."""

    def __init__(self, decoder: codec.Decoder) -> None:
        self.instances = Instances()
        self._decoder = decoder
        self._contents: dict[str, bytes | int] = {}
        self._contexts: dict[str, CallContext] = {}
        self._modules: tuple[str, codec.ModuleSet] | None = None
        #: The code that was bound last, and whether it is asynchronous.
        self._asked, self._is_async = "", False
        self._ready: _Ready | None = None
        self._base_path = list(sys.path)
        self._own = {name: os.environ[name] for name in _OWN_VARIABLES if name in os.environ}

    def learn(self, digest: str, content: bytes | int) -> None:
        """Content that calls will refer to; a descriptor is this object's from here on. Any thread."""
        self._contents[digest] = content

    def prepare(self, run: Run, others_run: bool) -> Bound:
        """Raises what the code or the arguments raise, and ``StaleModules``.

        The surroundings stay, unless other bodies are at work: those get theirs back.
        """
        ready, self._ready = self._ready, None
        if ready is not None and not others_run and _is_ready(ready, run):
            return Bound(ready.target, ready.is_async, *self._load_arguments(run))
        with self._surroundings(run, transient=run.inline or others_run):
            self._install_modules(run)
            return self._bind(run)

    def make_ready(self, run: Run) -> None:
        """For another call like this one, which has been answered: while its caller reads that, nobody waits for this."""
        with contextlib.suppress(Exception):  # the next call will meet it too
            with self._surroundings(run, transient=False):
                self._install_modules(run)
                target = self._decoder.load_target(self._content(run.code), run.code)
            if self._asked == run.code:
                self._ready = _Ready(run.context, run.modules, run.code, target, self._is_async, time.monotonic() + _READY_SECONDS)

    def forget_ready(self) -> None:
        """Something of the user's has run."""
        self._ready = None

    def _surroundings(self, run: Run, transient: bool) -> contextlib.AbstractContextManager[None]:
        if run.context not in self._contexts:
            self._contexts[run.context] = CallContext(json.loads(self._content(run.context)))
        context = self._contexts[run.context]
        if transient:
            return context.applied(self._own, self._base_path)
        context.apply(self._own, self._base_path)
        return _NOTHING

    def _install_modules(self, run: Run) -> None:
        """At every call: a module that a body imported from disk may have been edited since (it is then stale)."""
        if self._modules is None or self._modules[0] != run.modules:
            found = codec.ModuleSet.from_bytes(self._content(run.modules)) if run.modules else codec.ModuleSet()
            self._modules = (run.modules, found)
        # A lease is one run of one script: it goes on with what it has imported, like any script.
        finder().install(self._modules[1], _MODULES_SECONDS if run.number > 1 else 0.0)

    def _content(self, digest: str) -> bytes:
        found = self._contents[digest]
        if isinstance(found, int):
            with open(found, "rb") as file:
                found = self._contents[digest] = file.read()
        return found

    def _bind(self, run: Run) -> Bound:
        target: Any = self._decoder.load_target(self._content(run.code), run.code)
        if run.instance is not None:
            target, run.instance["constructed"] = self.instances.method(run.instance, lambda: self._construct(target, run))
        if run.instance is not None or self._asked != run.code:
            self._asked, self._is_async = run.code, is_async(target)
        args, kwargs = self._load_arguments(run)
        return Bound(target, self._is_async, args, kwargs)

    def _construct(self, kind: Any, run: Run) -> Any:
        assert run.instance is not None
        args, kwargs = self._decoder.load_arguments(self._content(run.instance["constructor"]))
        return kind(*args, **kwargs)

    def _load_arguments(self, run: Run) -> Any:
        if run.problem is not None:
            raise run.problem
        source, buffers = run.arguments, run.buffers
        run.buffers = None  # gigabytes of arguments must not outlive the body's own use
        if run.is_raw:
            return (_read(source),), {}
        if isinstance(source, bytes):
            return plain.loads(source) if run.is_plain else self._decoder.load_arguments(source, buffers)
        with open(source, "rb") as file:
            if (found := parcel.unpack(source)) is not None:
                return self._decoder.load_arguments(*found)
            file.seek(0)  # the offset is the sender's
            return self._decoder.load_arguments(file, buffers)


def _is_ready(ready: _Ready, run: Run) -> bool:
    """Only for calls on a lease but its first: those look at what was imported from disk."""
    same = run.number > 1 and run.code == ready.code and run.context == ready.context and run.modules == ready.modules
    return same and run.instance is None and time.monotonic() < ready.until and _thread._count() <= _OWN_THREADS


def _read(source: bytes | int) -> bytes:
    if isinstance(source, bytes):
        return source
    with open(source, "rb") as file:
        file.seek(0)  # the offset is the sender's
        return file.read()
